"""Input that is nearly right: makers of it, each from a seed, so that what they find can be found again."""
