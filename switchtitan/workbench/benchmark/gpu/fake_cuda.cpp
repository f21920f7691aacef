// Parts that torch's CPU build lacks for fake CUDA tensors: a guard for one device, hooks that report
// it, and its choice of fused kernels. They do nothing, since fake tensors have no memory and run no
// kernels.

#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;

c10::Device theDevice() {
  return c10::Device(kCuda, 0);
}

c10::Stream theStream() {
  return c10::Stream(c10::Stream::DEFAULT, theDevice());
}

// The base class returns "device -1" as current device and stream, which autograd refuses.
class OneDeviceGuard final : public c10::impl::NoOpDeviceGuardImpl<kCuda> {
 public:
  c10::Device getDevice() const override {
    return theDevice();
  }
  c10::Device exchangeDevice(c10::Device /*device*/) const override {
    return theDevice();
  }
  c10::Stream getStream(c10::Device /*device*/) const noexcept override {
    return theStream();
  }
  c10::Stream getNewStream(c10::Device /*device*/, int /*priority*/) const override {
    return theStream();
  }
  c10::Stream exchangeStream(c10::Stream /*stream*/) const noexcept override {
    return theStream();
  }
  // Autograd orders the streams of its nodes by events; the base class throws.
  void record(void** /*event*/, const c10::Stream& /*stream*/, c10::DeviceIndex /*index*/, c10::EventFlag /*flag*/)
      const override {}
  void block(void* /*event*/, const c10::Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override {
    return true;
  }
};

class OneDeviceHooks final : public at::CUDAHooksInterface {
 public:
  explicit OneDeviceHooks(at::CUDAHooksArgs /*args*/) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex /*index*/) const override {
    return true;
  }
  int getNumGPUs() const override {
    return 1;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex current_device() const override {
    return 0;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex /*index*/) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex /*index*/) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex /*index*/) const override {
    return 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetCPUAllocator();
  }
};

} // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, OneDeviceGuard)
} // namespace c10::impl

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneDeviceHooks)
} // namespace at

namespace at::native {
namespace {
// What a GPU since Ampere chooses without a mask (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
int64_t chooseAttention(
    const Tensor& query,
    const Tensor& /*key*/,
    const Tensor& /*value*/,
    const std::optional<Tensor>& mask,
    double /*dropout*/,
    bool /*isCausal*/,
    std::optional<double> /*scale*/,
    bool /*enableGqa*/) {
  TORCH_CHECK(!mask.has_value(), "attention with a mask on a GPU that is not there");
  SDPBackend chosen = SDPBackend::flash_attention;
  if (query.scalar_type() == kFloat) {
    bool isAligned = query.sym_size(-1) % 4 == 0;
    chosen = isAligned ? SDPBackend::efficient_attention : SDPBackend::math;
  }
  return static_cast<int64_t>(chosen);
}
} // namespace

REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &chooseAttention)
} // namespace at::native

// Fake tensors call no kernel, but torch takes an operation without one apart.
void noKernel(const c10::OperatorHandle& /*operation*/, torch::jit::Stack* /*stack*/) {}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : {"_fused_rms_norm", "_fused_rms_norm_backward"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&noKernel>());
  }
}
