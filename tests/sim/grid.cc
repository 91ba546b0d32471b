#include "tests/sim/grid.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

namespace epcomm::sim {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kPoison = 0xab;  // shared memory when a block begins
constexpr size_t kSmThreads = 2048, kSmShared = 228 << 10, kBlockOverhead = 1 << 10;
constexpr size_t kMaxSmBlocks = 32;
constexpr size_t kSharedAlignment = 16;  // no more than kernels may count on

// Of the grids that run now, on all devices of this process.
struct Running {
  std::mutex mutex;
  std::vector<std::weak_ptr<Rounds>> rounds;
};
// Never destroyed, as devices are not.
Running& running() {
  static Running* const it = new Running;
  return *it;
}

// Memory of which the first byte is a multiple of 16 and of nothing larger.
std::pair<std::unique_ptr<char[]>, char*> shared_memory(size_t bytes) {
  auto memory = std::make_unique<char[]>(bytes + 256);
  std::memset(memory.get(), kPoison, bytes + 256);
  char* p = memory.get();
  p += (128 - reinterpret_cast<uintptr_t>(p) % 128) % 128 + kSharedAlignment;
  return {std::move(memory), p};
}

uint64_t reduce(Collective collective, uint64_t a, uint64_t b) {
  switch (collective) {
    case Collective::kReduceAdd:
      return a + b;
    case Collective::kReduceMin:
      return static_cast<uint64_t>(std::min(static_cast<int64_t>(a), static_cast<int64_t>(b)));
    case Collective::kReduceMax:
      return static_cast<uint64_t>(std::max(static_cast<int64_t>(a), static_cast<int64_t>(b)));
    case Collective::kReduceAnd:
      return a & b;
    default:
      return a | b;
  }
}

}  // namespace

bool Block::owns(const void* p, size_t bytes) const {
  const char* at = static_cast<const char*>(p);
  auto inside = [&](const char* begin, size_t size) {
    return begin != nullptr && at >= begin && at + bytes <= begin + size;
  };
  return inside(dynamic, grid->shape.shared_bytes) ||
         std::any_of(variables.begin(), variables.end(),
                     [&](const SharedVariable& v) { return inside(v.data, v.bytes); });
}

Grid::Grid(const GridShape& shape_, const GridSettings& settings, std::function<void()> kernel,
           FiberPool& fibers)
    : shape(shape_),
      settings_(settings),
      kernel_(std::move(kernel)),
      fibers_(fibers),
      random_(settings.seed) {
  auto pick_one = [&](std::initializer_list<uint32_t> of) {
    return of.begin()[random_.below(static_cast<uint32_t>(of.size()))];
  };
  copy_steps_ = pick_one({1, 8, 200});
  hold_back_steps_ = pick_one({4, 64, 1000});
  late_stores_ = pick_one({0, 4, 64});
  copies.late_stores = settings.late_bulk_stores;
  for (unsigned i = shape.blocks; i-- > 0;) to_start_.push_back(i);
  if (settings_.any_order)
    for (uint32_t n = shape.blocks; n > 1; --n)
      std::swap(to_start_[n - 1], to_start_[random_.below(n)]);
}

Grid::~Grid() {
  for (const auto& block : blocks_)
    for (Thread& thread : block->threads)
      if (thread.fiber != nullptr) fibers_.put(thread.fiber);
}

// Blocks that fit at a time: others start when one has ended, as on a real GPU.
int Grid::max_resident() const {
  const size_t threads = (shape.threads + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  const size_t by_threads = kSmThreads / threads;
  const size_t by_shared = kSmShared / (shape.shared_bytes + kBlockOverhead);
  return static_cast<int>(std::max<size_t>(std::min({by_threads, by_shared, kMaxSmBlocks}), 1)) *
         settings_.num_sms;
}

void Grid::start_block() {
  auto owner = std::make_unique<Block>();
  Block& block = *owner;
  block.grid = this;
  block.index = to_start_.back();
  to_start_.pop_back();
  block.live = static_cast<int>(shape.threads);
  std::tie(block.dynamic_memory, block.dynamic) = shared_memory(shape.shared_bytes);
  const size_t num_warps = (shape.threads + kWarpThreads - 1) / kWarpThreads;
  block.threads = std::vector<Thread>(shape.threads);
  block.warps = std::vector<Warp>(num_warps);
  for (unsigned i = 0; i < shape.threads; ++i) {
    Thread& thread = block.threads[i];
    thread.index = i;
    thread.lane = static_cast<int>(i % kWarpThreads);
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpThreads];
    thread.fiber = fibers_.get();
    thread.fiber->reset([](void* grid) { static_cast<Grid*>(grid)->kernel_(); }, this);
  }
  for (size_t w = 0; w < num_warps; ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.threads = &block.threads[w * kWarpThreads];
    const size_t lanes = std::min<size_t>(shape.threads - w * kWarpThreads, kWarpThreads);
    warp.live = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    warp.slow = random_.one_in(4);
    ready(warp, warp.live);
  }
  blocks_.push_back(std::move(owner));
}

void Grid::end_block(Block& block) {
  if (const std::string why = copies.unfinished(block); !why.empty()) {
    fault_ = describe("block " + std::to_string(block.index) + ": " + why);
    return;
  }
  for (Thread& thread : block.threads) fibers_.put(std::exchange(thread.fiber, nullptr));
  ++ended_;
  std::erase_if(blocks_, [&](const auto& owner) { return owner.get() == &block; });
}

void Grid::run() {
  begin_ = std::chrono::steady_clock::now();
  rounds_ = std::make_shared<Rounds>(0);
  {
    std::lock_guard lock(running().mutex);
    std::erase_if(running().rounds, [](const auto& other) { return other.expired(); });
    running().rounds.push_back(rounds_);
  }
  while (ended_ < shape.blocks && fault_.empty()) {
    while (!to_start_.empty() && blocks_.size() < static_cast<size_t>(max_resident()))
      start_block();
    if (!runnable_.empty()) {
      run_warp(pick());
      if (random_.one_in(copy_steps_)) copies.advance(random_);
      if (idle_picks_ > 2 * runnable_.size() + 2 || ++steps_ % 4096 == 0) idle();
    } else if (!copies.advance(random_)) {
      fault_ = describe("deadlock: no thread can go on");
    }
  }
  current_thread = nullptr;
  rounds_ = nullptr;
  if (!fault_.empty()) throw Fault(fault_);
  // What was not waited for is seen when the kernel is over, and a peer that was signalled too
  // early is to look before that.
  if (!copies.empty() || (!unseen_.empty() && random_.one_in(2))) let_others_look();
  for (const auto& store : unseen_) std::memcpy(store.to, store.data, sizeof store.data);
  copies.finish();
}

// Other processes get half a millisecond; a machine can be too busy for any fixed time, so grids of
// this one get what they need.
void Grid::let_others_look() const {
  constexpr uint64_t kRounds = 3;
  std::vector<std::pair<std::weak_ptr<Rounds>, uint64_t>> others;
  {
    std::lock_guard lock(running().mutex);
    for (const auto& other : running().rounds)
      if (const auto rounds = other.lock()) others.emplace_back(other, *rounds + kRounds);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  do {
    ::usleep(500);
    std::erase_if(others, [](const auto& other) {
      const auto rounds = other.first.lock();
      return rounds == nullptr || *rounds >= other.second;
    });
  } while (!others.empty() && std::chrono::steady_clock::now() < deadline);
}

// All threads that can run only poll.
void Grid::idle() {
  idle_picks_ = 0;
  ++*rounds_;
  if (copies.advance(random_)) return;
  if (++idle_rounds_ < 100)
    std::this_thread::yield();
  else
    ::usleep(20);
  const std::chrono::duration<double> ran = std::chrono::steady_clock::now() - begin_;
  if (ran.count() > settings_.limit_s)
    fault_ = describe("not done after " + std::to_string(ran.count()) + " s");
}

void Grid::ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.queued || warp.ready == 0) return;
  warp.queued = true;
  runnable_.push_back(&warp);
}

Warp& Grid::pick() {
  size_t i = 0;
  for (int tries = 0; tries < 3; ++tries) {
    i = random_.below(static_cast<uint32_t>(runnable_.size()));
    if (!runnable_[i]->slow) break;
  }
  Warp& warp = *runnable_[i];
  runnable_[i] = runnable_.back();
  runnable_.pop_back();
  return warp;
}

void Grid::run_warp(Warp& warp) {
  Block& block = *warp.block;
  uint32_t later = 0;
  bool progress = false;
  const int first = static_cast<int>(random_.below(kWarpThreads));
  while (warp.ready != 0 && fault_.empty()) {
    const int lane = (std::countr_zero(std::rotr(warp.ready, first)) + first) % kWarpThreads;
    warp.ready &= ~(1u << lane);
    Thread& thread = warp.threads[lane];
    run_thread(thread);
    if (thread.state == Thread::kPolling || thread.state == Thread::kHeldBack) later |= 1u << lane;
    progress |= thread.state != Thread::kPolling;
  }
  idle_picks_ = progress ? 0 : idle_picks_ + 1;
  if (progress) idle_rounds_ = 0;
  warp.queued = false;
  ready(warp, later);
  if (block.live == 0 && fault_.empty()) end_block(block);
}

void Grid::run_thread(Thread& thread) {
  current_thread = &thread;
  thread.state = Thread::kReady;
  if (!thread.fiber->resume())
    fault_ = describe("thread " + std::to_string(thread.index) + " of block " +
                      std::to_string(thread.block->index) + " needs more stack than " +
                      std::to_string(Fiber::kStackBytes) + " bytes");
  if (thread.fiber->ended()) end_thread(thread);
}

void Grid::end_thread(Thread& thread) {
  thread.state = Thread::kEnded;
  unseen_.insert(unseen_.end(), thread.stores.begin(), thread.stores.end());
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  warp.live &= ~(1u << thread.lane);
  --block.live;
  release_block_if_complete(block);
  for (int lane = 0; lane < kWarpThreads; ++lane)
    if ((warp.live >> lane & 1) != 0 && warp.threads[lane].state == Thread::kInCollective)
      release_warp_if_complete(warp, warp.threads[lane].mask);
}

void Grid::suspend(Thread& thread, Thread::State state, const char* verb, const Where& where) {
  thread.state = state;
  thread.waits_in = verb;
  thread.where = where;
  thread.fiber->suspend();
}

void Grid::poll(const char* verb, const Where& where) {
  suspend(self(), Thread::kPolling, verb, where);
}

void Grid::hold_back() {
  if (random_.one_in(hold_back_steps_)) suspend(self(), Thread::kHeldBack, "", self().where);
}

// ---- block barrier ----

Votes Grid::sync_block(bool vote, const Where& where) {
  flush_stores();
  Thread& thread = self();
  Block& block = *thread.block;
  ++block.at_barrier;
  ++block.votes.of;
  block.votes.count += vote ? 1 : 0;
  thread.state = Thread::kInBlockBarrier;
  release_block_if_complete(block);
  suspend(thread, thread.state, "__syncthreads", where);
  return block.result;
}

void Grid::release_block_if_complete(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier != block.live) return;
  block.at_barrier = 0;
  block.result = std::exchange(block.votes, {});
  for (Warp& warp : block.warps) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      if ((warp.live >> lane & 1) == 0) continue;
      Thread& thread = warp.threads[lane];
      if (thread.state != Thread::kInBlockBarrier) continue;
      thread.state = Thread::kReady;
      lanes |= 1u << lane;
    }
    ready(warp, lanes);
  }
}

// ---- warp collectives ----

uint64_t Grid::meet_warp(Collective collective, uint32_t mask, uint64_t value, int source_lane,
                         const char* verb, const Where& where) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if ((mask >> thread.lane & 1) == 0)
    fail(std::string(verb) + ": the mask leaves out the lane that calls", where);
  if (collective == Collective::kSync) flush_stores();
  thread.collective = collective;
  thread.mask = mask;
  thread.value = value;
  thread.source_lane = source_lane;
  thread.state = Thread::kInCollective;
  thread.waits_in = verb;
  thread.where = where;
  release_warp_if_complete(warp, mask);
  suspend(thread, thread.state, verb, where);
  return thread.value;
}

void Grid::release_warp_if_complete(Warp& warp, uint32_t mask) {
  const uint32_t lanes = mask & warp.live;
  if (lanes == 0) return;
  const Thread* first = nullptr;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const Thread& thread = warp.threads[lane];
    if (thread.state != Thread::kInCollective || thread.mask != mask) return;
    if (first == nullptr) first = &thread;
    if (thread.collective != first->collective) {
      fault_ = describe(std::string("lanes of one warp meet in different collectives, ") +
                        first->waits_in + " and " + thread.waits_in);
      return;
    }
  }
  const Collective collective = first->collective;
  uint64_t values[kWarpThreads] = {}, all = first->value;
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    values[lane] = warp.threads[lane].value;
    if (values[lane] != 0) ballot |= 1u << lane;
    if (&warp.threads[lane] != first) all = reduce(collective, all, values[lane]);
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    Thread& thread = warp.threads[lane];
    thread.state = Thread::kReady;
    if (collective == Collective::kBallot) {
      thread.value = ballot;
    } else if (collective == Collective::kShuffle) {
      // What a lane that takes no part would give is undefined.
      const bool there = (lanes >> thread.source_lane & 1) != 0;
      thread.value = there ? values[thread.source_lane] : 0xabababababababab;
    } else if (collective == Collective::kMatchAny) {
      uint32_t same = 0;
      for (int other = 0; other < kWarpThreads; ++other)
        if ((lanes >> other & 1) != 0 && values[other] == values[lane]) same |= 1u << other;
      thread.value = same;
    } else {
      thread.value = all;
    }
  }
  ready(warp, lanes);
}

// ---- memory ----

char* Grid::shared_variable(const void* id, size_t bytes) {
  Block& block = *self().block;
  for (const Block::SharedVariable& variable : block.variables)
    if (variable.id == id) return variable.data;
  auto [memory, data] = shared_memory(bytes);
  block.variables.push_back({id, bytes, std::move(memory), data});
  return data;
}

void Grid::store_late(void* to, const void* data) {
  auto& stores = self().stores;
  Thread::DelayedStore store;
  store.to = to;
  std::memcpy(store.data, data, sizeof store.data);
  stores.push_back(store);
  while (stores.size() > late_stores_) {
    const size_t i = random_.below(static_cast<uint32_t>(stores.size()));
    // Stores of one thread to one place stay in order.
    const auto first = std::find_if(stores.begin(), stores.end(),
                                    [&](const auto& other) { return other.to == stores[i].to; });
    std::memcpy(first->to, first->data, sizeof first->data);
    stores.erase(first);
  }
}

void Grid::flush_stores() {
  auto& stores = self().stores;
  for (const auto& store : stores) std::memcpy(store.to, store.data, sizeof store.data);
  stores.clear();
}

// ---- faults ----

void Grid::fail(const std::string& what, const Where& where) {
  Thread& thread = self();
  fault_ = describe("block " + std::to_string(thread.block->index) + ", thread " +
                    std::to_string(thread.index) + ", " + where.file_name() + ":" +
                    std::to_string(where.line()) + " (" + where.function_name() + "): " + what);
  for (;;) thread.fiber->suspend();
}

std::string Grid::describe(const std::string& what) const {
  std::string text = "device " + std::to_string(settings_.device) + ", grid of " +
                     std::to_string(shape.blocks) + " x " + std::to_string(shape.threads) + ": " +
                     what;
  // Threads that wait for the same thing are told together.
  std::map<std::tuple<unsigned, std::string, unsigned, std::string>, std::pair<unsigned, unsigned>>
      waiting;
  for (const auto& block : blocks_)
    for (const Thread& thread : block->threads) {
      if (thread.state != Thread::kPolling && thread.state != Thread::kInBlockBarrier &&
          thread.state != Thread::kInCollective)
        continue;
      auto& [count, lowest] =
          waiting[{block->index, thread.where.file_name(), thread.where.line(), thread.waits_in}];
      if (count++ == 0) lowest = thread.index;
    }
  int lines = 0;
  for (const auto& [at, threads] : waiting) {
    if (++lines > 20) break;
    text += "\n  block " + std::to_string(std::get<0>(at)) + ": " + std::to_string(threads.first) +
            " threads from " + std::to_string(threads.second) + " on wait in " + std::get<3>(at) +
            " at " + std::get<1>(at) + ":" + std::to_string(std::get<2>(at));
  }
  return text;
}

}  // namespace epcomm::sim
