"""How the `streets` dataset is drawn: what a street contains, how it is painted, how the two domains look."""
