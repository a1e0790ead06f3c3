"""A simulator of devices, links and cloud pods: discrete events, the product's own decisions (decision 0014)."""
