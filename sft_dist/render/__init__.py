"""What people look at: data previews and before/after comparisons, in the terminal and as pages. Free of torch."""
