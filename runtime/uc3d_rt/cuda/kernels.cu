// All kernels, as one module.
#include "render.cu"
#include "optimize.cu"
#include "redistance.cu"
#include "hull.cu"
#include "carve.cu"
#include "solve.cu"
#include "colors.cu"
#include "raster.cu"
