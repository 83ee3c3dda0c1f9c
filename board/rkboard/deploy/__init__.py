"""Put RKEdge, a library and bundles onto a board over ssh, switch between them, and take them off again."""
