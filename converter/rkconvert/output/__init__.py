"""What is written, and where: folders, bundles, the hub, disk space."""
