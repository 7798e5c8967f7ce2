// Flash behind the unit, for Verilated simulations: flash_model.py in C++, the same beats in the same cycles.
// The comments there say what is modelled; names here are the same. A test holds the two against each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <list>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace kvstrata {

constexpr unsigned kPageBytes = 4096;
constexpr unsigned kBeatBytes = 8;
constexpr unsigned kPageBeats = kPageBytes / kBeatBytes;
constexpr unsigned kImageVersion = 1;

// Fields of golden.spec.storage.PPN.
inline unsigned ppn_plane(uint32_t ppn) { return ppn >> 22 & 3; }
inline unsigned ppn_die(uint32_t ppn) { return ppn >> 24 & 15; }
inline unsigned ppn_channel(uint32_t ppn) { return ppn >> 28; }

struct FlashParams {
  long clock_mhz = 285, channel_mb_per_s = 1400, dies = 16, planes = 4, independent_planes = 1, cache_read = 1;
  long read_ns = 50000, command_ns = 300, ecc_ns = 1000, queue = 64;
  long retry_per_million = 0, retry_max = 5, fail_per_million = 0, seed = 1;

  // Take a `name=value` word; false if it names no parameter.
  bool set(const std::string& word) {
    const auto equals = word.find('=');
    if (equals == std::string::npos) return false;
    const std::string name = word.substr(0, equals);
    struct { const char* name; long* field; } const fields[] = {
        {"clock_mhz", &clock_mhz}, {"channel_mb_per_s", &channel_mb_per_s}, {"dies", &dies}, {"planes", &planes},
        {"independent_planes", &independent_planes}, {"cache_read", &cache_read}, {"read_ns", &read_ns},
        {"command_ns", &command_ns}, {"ecc_ns", &ecc_ns}, {"queue", &queue},
        {"retry_per_million", &retry_per_million}, {"retry_max", &retry_max},
        {"fail_per_million", &fail_per_million}, {"seed", &seed}};
    for (const auto& f : fields)
      if (name == f.name) {
        *f.field = std::stol(word.substr(equals + 1));
        return true;
      }
    return false;
  }
  long cycles(long nanoseconds) const { return (nanoseconds * clock_mhz + 999) / 1000; }
  long arrays() const { return dies * (independent_planes ? planes : 1); }
};

inline uint64_t page_hash(uint64_t seed, uint64_t ppn, uint64_t salt) {
  uint64_t z = seed * 0x9E3779B97F4A7C15ull + ppn * 0xD1B54A32D192ED03ull + salt * 0x8CB92BA72F3D8DD7ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Contents of the device: pages that were written, and pages that are uncorrectable.
class FlashImage {
 public:
  FlashImage() = default;
  explicit FlashImage(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) throw std::runtime_error("cannot open the flash image " + path);
    struct Header { char magic[7]; uint8_t version; uint32_t pages, failing; } header;
    static_assert(sizeof(Header) == 16);
    auto get = [&](void* to, size_t bytes) {
      if (std::fread(to, 1, bytes, file) != bytes) throw std::runtime_error("the flash image " + path + " is truncated");
    };
    get(&header, sizeof header);
    if (std::memcmp(header.magic, "KVFLASH", 7) || header.version != kImageVersion)
      throw std::runtime_error(path + " is no flash image of version " + std::to_string(kImageVersion));
    for (uint32_t n = 0; n < header.pages; n++) {
      uint32_t ppn;
      get(&ppn, 4);
      auto& page = pages_[ppn];
      page.resize(kPageBeats);
      get(page.data(), kPageBytes);
    }
    for (uint32_t n = 0; n < header.failing; n++) {
      uint32_t ppn;
      get(&ppn, 4);
      failing_.insert(ppn);
    }
    std::fclose(file);
  }
  uint64_t word(uint32_t ppn, unsigned beat) const {
    const auto found = pages_.find(ppn);
    return found == pages_.end() ? ~0ull : found->second[beat];
  }
  bool fails(uint32_t ppn) const { return failing_.count(ppn) != 0; }

 private:
  std::unordered_map<uint32_t, std::vector<uint64_t>> pages_;
  std::unordered_set<uint32_t> failing_;
};

struct FlashBeat {
  uint64_t data;
  bool first, last, fail;
  unsigned slot, kernel;
};

// One channel. Per clock cycle: read `command_ready`, `valid` and `beat`, drive the unit with them, `grant` what the unit
// grants, then `tick`.
class FlashChannel {
 public:
  FlashChannel(const FlashParams& params, const FlashImage& image)
      : p_(params), image_(image), cost_(kBeatBytes * params.clock_mhz), arrays_(params.arrays()) {}

  bool command_ready() const { return reads_.size() < size_t(p_.queue); }
  bool valid() const { return sending_ && credit_ >= cost_; }
  FlashBeat beat() const {
    const Read& read = *sending_;
    uint64_t word = image_.word(read.ppn, sent_);
    if (read.fail) word ^= page_hash(p_.seed, read.ppn, 4 + sent_);
    const bool last = sent_ == kPageBeats - 1;
    return {word, sent_ == 0, last, read.fail && last, unsigned(read.slot), read.kernel};
  }
  // In this cycle the oldest page of `kernel` without a name may be sent as `slot`.
  void grant(unsigned kernel, unsigned slot) { granted_.push_back({kernel, slot}); }
  // One clock edge: whether a command moved, with its page and kernel.
  void tick(bool commanded, uint32_t ppn, unsigned kernel) {
    const bool taken = valid();
    if (sending_) credit_ = std::min(credit_ - taken * cost_ + p_.channel_mb_per_s, 2 * cost_ - 1);
    if (taken && ++sent_ == kPageBeats) finish();
    if (commanded) accept(ppn, kernel);
    for (const auto& [who, slot] : granted_) grants_[who].push_back(slot), name(who);
    granted_.clear();
    now_++;
    if (!sending_) choose();
  }
  uint64_t delivered() const { return delivered_; }
  bool idle() const { return reads_.empty(); }

 private:
  struct Read {
    uint32_t ppn;
    unsigned kernel;
    long array, retries;
    bool fail;
    long slot = -1, ready_at = -1;
  };
  struct Array {
    std::deque<Read*> waiting;
    long sensed_at = 0, holding = 0;
  };

  void accept(uint32_t ppn, unsigned kernel) {
    const long die = ppn_die(ppn) % p_.dies, plane = ppn_plane(ppn) % p_.planes;
    Read read{ppn, kernel, p_.independent_planes ? die * p_.planes + plane : die, 0, false};
    if (image_.fails(ppn) || long(page_hash(p_.seed, ppn, 1) % 1000000) < p_.fail_per_million) {
      read.retries = p_.retry_max;
      read.fail = true;
    } else if (p_.retry_max && long(page_hash(p_.seed, ppn, 2) % 1000000) < p_.retry_per_million) {
      read.retries = 1 + long(page_hash(p_.seed, ppn, 3) % uint64_t(p_.retry_max));
    }
    reads_.push_back(read);
    arrays_[read.array].waiting.push_back(&reads_.back());
    nameless_[kernel].push_back(&reads_.back());
    name(kernel);
    start(read.array);
  }
  void name(unsigned kernel) {
    if (nameless_[kernel].empty() || grants_[kernel].empty()) return;
    nameless_[kernel].front()->slot = grants_[kernel].front();
    nameless_[kernel].pop_front();
    grants_[kernel].pop_front();
  }
  void choose() {
    for (Read& read : reads_)
      if (read.slot >= 0 && read.ready_at >= 0 && read.ready_at <= now_) {
        sending_ = &read;
        return;
      }
  }
  void start(long index) {
    Array& array = arrays_[index];
    while (!array.waiting.empty() && array.holding <= p_.cache_read) {
      Read& read = *array.waiting.front();
      array.waiting.pop_front();
      const long begin = std::max(now_ + p_.cycles(p_.command_ns), array.sensed_at);
      array.sensed_at = begin + p_.cycles(p_.read_ns) * (1 + read.retries);
      read.ready_at = array.sensed_at + p_.cycles(p_.ecc_ns);
      array.holding++;
    }
  }
  void finish() {
    const Read* sent = sending_;
    const long index = sent->array;
    reads_.remove_if([sent](const Read& read) { return &read == sent; });
    sending_ = nullptr;
    arrays_[index].holding--;
    sent_ = 0;
    delivered_++;
    start(index);
  }

  FlashParams p_;
  const FlashImage& image_;
  long cost_, now_ = 0, credit_ = 0;
  unsigned sent_ = 0;
  uint64_t delivered_ = 0;
  std::list<Read> reads_;  // in order of their commands, until they have been sent
  Read* sending_ = nullptr;
  std::deque<Read*> nameless_[2];   // per kernel, without a grant
  std::deque<unsigned> grants_[2];  // per kernel, without a read
  std::vector<std::pair<unsigned, unsigned>> granted_;
  std::vector<Array> arrays_;
};

}  // namespace kvstrata
