"""The parts of the core: nodes, gradients and the engine. Import them from `distgrad._core`."""
