#include "tests/sim/runtime.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#include "tests/sim/devices.h"

namespace epcomm::sim {

World::World() {
  for (int i = 0; i < options().num_devices; ++i) devices.push_back(std::make_unique<Device>());
}

World& world() {
  static World* const it = new World;
  return *it;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

Device& device(int i) { return *world().devices[static_cast<size_t>(i)]; }

bool failed(int i) {
  std::lock_guard lock(device(i).mutex);
  return !device(i).fault.empty();
}

void raise_fault(int i, const std::string& what) {
  {
    std::lock_guard lock(device(i).mutex);
    if (device(i).fault.empty()) device(i).fault = what;
  }
  const std::string text = "seed " + std::to_string(options().seed) + ", " + what;
  if (options().print_faults) std::fprintf(stderr, "simulated GPU: %s\n", text.c_str());
  std::lock_guard lock(world().mutex);
  world().faults.push_back(text);
}

void wait_for(int device, Recording& recording) {
  std::unique_lock lock(recording.mutex);
  const std::chrono::duration<double> limit(options().limit_s);
  if (!recording.changed.wait_for(lock, limit, [&] { return recording.complete; })) {
    lock.unlock();
    raise_fault(device, "device " + std::to_string(device) + ": an event was not reached in " +
                            std::to_string(options().limit_s) + " s");
  }
}

cudaError_t synchronize_device(int i) {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    std::lock_guard lock(device(i).mutex);
    for (const auto& stream : device(i).streams)
      if (auto alive = stream.lock()) streams.push_back(std::move(alive));
  }
  for (const auto& stream : streams) stream->synchronize();
  return failed(i) ? cudaErrorLaunchFailure : cudaSuccess;
}

std::shared_ptr<Stream> make_stream(int i) {
  auto stream = std::make_shared<Stream>(i);
  std::lock_guard lock(device(i).mutex);
  std::erase_if(device(i).streams, [](const auto& other) { return other.expired(); });
  device(i).streams.push_back(stream);
  std::thread([stream] { stream->work_off(); }).detach();
  return stream;
}

Options& options() {
  static Options it = [] {
    Options o;
    const char* seed = std::getenv("EPCOMM_SIM_SEED");
    o.seed = seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10);
    const char* mapped = std::getenv("EPCOMM_SIM_MAPPED");
    const std::string which = mapped == nullptr ? "" : mapped;
    o.mapped = [](int rank, int peer) { return (rank + peer) % 2 == 1; };
    if (which == "all") o.mapped = [](int, int) { return true; };
    if (which == "none") o.mapped = [](int, int) { return false; };
    return o;
  }();
  return it;
}

std::vector<std::string> take_faults() {
  for (const auto& d : world().devices) {
    std::lock_guard lock(d->mutex);
    d->fault.clear();
  }
  std::lock_guard lock(world().mutex);
  return std::exchange(world().faults, {});
}

size_t& shared_bytes_allowed(const void* kernel) {
  std::lock_guard lock(world().mutex);
  return world().shared_allowed.try_emplace({kernel, current_device}, kWithoutOptIn).first->second;
}

Issued issued() { return {world().kernels_issued, world().copies_issued}; }

// ---- streams ----

Stream::Stream(int device) : device_(device), random_(0) {
  static std::atomic<uint64_t> streams{0};
  random_ = Random(options().seed * 1000003 + streams++);
}

void Stream::enqueue(Work work) {
  if (graph != nullptr) {
    graph->work.push_back(std::move(work));
    return;
  }
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  changed_.notify_all();
}

void Stream::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

bool Stream::idle() {
  std::lock_guard lock(mutex_);
  return queue_.empty() && !busy_;
}

void Stream::synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
}

void Stream::work_off() {
  FiberPool fibers;
  for (;;) {
    Work work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
    }
    // The host gets ahead by more or less.
    if (random_.one_in(8)) ::usleep(random_.below(200));
    work(fibers);
    std::lock_guard lock(mutex_);
    busy_ = false;
    changed_.notify_all();
  }
}

Stream& resolve(cudaStream_t stream) {
  if (stream != nullptr) return *stream;
  Device& d = device(current_device);
  {
    std::lock_guard lock(d.mutex);
    if (d.default_stream) return *d.default_stream;
  }
  auto made = make_stream(current_device);
  std::lock_guard lock(d.mutex);
  if (d.default_stream)
    made->close();
  else
    d.default_stream = std::move(made);
  return *d.default_stream;
}

cudaError_t enqueue_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel,
                         size_t args_bytes, size_t most_shared_bytes) {
  const dim3 blocks = config.gridDim, threads = config.blockDim;
  if (blocks.x == 0 || threads.x == 0 || threads.x > 1024 || blocks.y * blocks.z != 1 ||
      threads.y * threads.z != 1 || config.dynamicSmemBytes > most_shared_bytes ||
      most_shared_bytes > kMaxShared || args_bytes > kMaxArgs)
    return remember(cudaErrorInvalidConfiguration);
  Stream& stream = resolve(config.stream);
  const int i = stream.device();
  if (failed(i)) return remember(cudaErrorLaunchFailure);
  const GridShape shape{blocks.x, threads.x, config.dynamicSmemBytes};
  ++world().kernels_issued;
  stream.enqueue([i, shape, kernel = std::move(kernel)](FiberPool& fibers) {
    if (failed(i)) return;
    GridSettings settings{i, options().num_sms - options().busy_sms, 0, options().limit_s};
    settings.any_order = options().busy_sms > 0;
    settings.late_bulk_stores = options().late_bulk_stores;
    {
      std::lock_guard lock(device(i).mutex);
      settings.seed =
          (options().seed * 1009 + static_cast<uint64_t>(i)) * 1000003 + device(i).grids++;
    }
    try {
      Grid(shape, settings, kernel, fibers).run();
    } catch (const Fault& fault) {
      raise_fault(i, fault.what());
    }
  });
  return cudaSuccess;
}

}  // namespace epcomm::sim
