"""The theorems of section 3 and the stiffness of (7), measured on small kernels in float64. Needs the extra ``dynamics``."""
