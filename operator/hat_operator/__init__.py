"""HAT's Kubernetes operator: HatDeployments become pods on the cloud's and the devices' side."""
