"""Outside providers: which there are, how they are reached, and what bytes come from them."""
