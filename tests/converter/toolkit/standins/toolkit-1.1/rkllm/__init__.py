"""A stand-in for the tests of RKEdge: not the vendor's rkllm-toolkit."""
