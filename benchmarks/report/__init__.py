"""The page and the plots generated from stored results."""
