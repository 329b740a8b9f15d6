// dQ as it is handed out: times the scale, rounded. `order` is an output of backward.cu, so that this kernel comes after it.

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float4* query_gradient, const void* order, uint2* output, int quads, int scale_bits) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= quads) return;
  const float scale = __int_as_float(scale_bits);
  const float4 x = query_gradient[i];
  output[i] = make_uint2(pack(x.x * scale, x.y * scale), pack(x.z * scale, x.w * scale));
}
