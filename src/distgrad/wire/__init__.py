"""The values of a message: encoder, decoder and what both agree on. See `distgrad._codec`."""
