"""One thin module a stage."""
