"""Data, one way through: sources, formats, template and loss mask, collation. One module a step."""
