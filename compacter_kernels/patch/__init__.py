"""Making the Compacter adapters of other libraries run through the kernels, in place."""
