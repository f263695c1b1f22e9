"""From a deployment to the manifests in k8s/: the overlay, and what its pods mount and ask for."""
