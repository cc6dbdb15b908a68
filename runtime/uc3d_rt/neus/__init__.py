"""NeuS surface fit on an explicit grid: six colour and normal views in, a signed distance field out.

One file an op (`hull`, `rays`, `render`, `losses`, `regularize`, `redistance`, `adam`); `fit` joins
them.  Numba is imported only when `uc3d_rt.neus.fit.fit` runs.
"""
