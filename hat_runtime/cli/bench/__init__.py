"""`hat bench`: the papers' tables on this machine."""
