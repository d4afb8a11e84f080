"""The page and the plots that are made from stored results."""
