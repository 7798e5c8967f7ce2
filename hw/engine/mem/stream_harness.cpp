// Streams one long descriptor through the striped reader, every channel on its own HBM model, and measures it.
//
//   sim <config file> <beats> <rows> <consumer idle percent>
//
// The consumer takes a beat of all channels together, as the array does, and compares each with the memory.
// Prints one line of JSON; exits 1 with a sentence on a wrong beat, a protocol violation or a hang.
#include <cstdio>
#include <fstream>
#include <memory>

#include "Vstriped_reader.h"
#include "hbm_model.h"
#include "hbm_pins.h"

using namespace kvstrata;

static uint64_t word_at(uint64_t channel, uint64_t address) {
    uint64_t x = (address / 8 + 1) * 0x9E3779B97F4A7C15ULL ^ (channel + 1) * 0xC2B2AE3D27D4EB4FULL;
    x = (x ^ x >> 31) * 0xD6E8FEB86659FD93ULL;
    return x ^ x >> 29;
}

int main(int argc, char** argv) {
    if (argc != 5) return std::fprintf(stderr, "usage: sim config beats rows idle_percent\n"), 2;
    std::ifstream file(argv[1]);
    std::string text((std::istreambuf_iterator<char>(file)), {});
    uint64_t beats = std::stoull(argv[2]), rows = std::stoull(argv[3]), idle = std::stoull(argv[4]);
    uint64_t total = beats * rows, bytes = total * 64;
    Config config(text);
    Random random(99);

    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<std::unique_ptr<Channel>> channel;
    std::vector<std::unique_ptr<ReadPort>> port;
    for (uint64_t n = 0; n < KV_CHANNELS; n++) {
        memory.push_back(std::make_unique<Memory>(1ULL << 28));
        channel.push_back(std::make_unique<Channel>(config, n));
        port.push_back(std::make_unique<ReadPort>(config, *memory[n], *channel[n], 0, n));
        for (uint64_t a = 0; a < bytes; a += 8) *reinterpret_cast<uint64_t*>(memory[n]->at(a)) = word_at(n, a);
    }

    auto top = std::make_unique<Vstriped_reader>();
    auto& t = *top;
    // Descriptor fields, low bits first: addr 28, beats 24, counts 16, strides 28.
    unsigned __int128 job = (unsigned __int128)beats << 28 | (unsigned __int128)rows << 52 |
                            (unsigned __int128)(beats * 64) << 68;
    for (int n = 0; n < 3; n++) t.i___05Fpayload[n] = uint32_t(job >> (32 * n));
    t.region_base = 0;
    t.region_limit = 1u << 28;
    t.__SYM__abort = t.clear = 0;
    t.rst = 0;
    t.i___05Fvalid = 1;

    uint64_t cycle = 0, taken = 0, first = 0, last = 0, accepted = 0;
    while (taken < total) {
#define DRIVE(n) KV_DRIVE_READ(t, axi___05F##n, *port[n]);
        KV_EACH_CHANNEL(DRIVE)
        t.clk = 0;
        t.eval();
        bool all = !random.percent(idle);
#define VALID(n) all = all && t.o___05F##n##___05Fvalid;
        KV_EACH_CHANNEL(VALID)
#define READY(n) t.o___05F##n##___05Fready = all;
        KV_EACH_CHANNEL(READY)
        t.eval();
        if (all) {
            if (!taken) first = cycle;
            last = cycle;
            uint64_t expected[8];
#define CHECK(n)                                                                                            \
    for (int w = 0; w < 8; w++) expected[w] = word_at(n, taken * 64 + w * 8);                               \
    if (std::memcmp(expected, &t.o___05F##n##___05Fpayload, 64)) {                                                  \
        std::fprintf(stderr, "channel %d: beat %llu is wrong\n", n, (unsigned long long)taken);             \
        return 1;                                                                                           \
    }
            KV_EACH_CHANNEL(CHECK)
            taken++;
        }
        bool start = t.i___05Fvalid && t.i___05Fready;
        if (start) accepted = cycle;
        // The ports see what the design held before the edge.
#define CLOCK(n) KV_CLOCK_READ(t, axi___05F##n, *port[n], cycle);
        KV_EACH_CHANNEL(CLOCK)
        t.clk = 1;
        t.eval();
        if (start) t.i___05Fvalid = 0;
        if (++cycle > 100 * total + 100000) return std::fprintf(stderr, "no progress after %llu beats\n", (unsigned long long)taken), 1;
    }
    uint64_t latency = 0, bursts = 0, hits = 0, closed = 0, misses = 0, refreshes = 0, worst = 0;
    for (int n = 0; n < KV_CHANNELS; n++) {
        if (!port[n]->violations.empty()) return std::fprintf(stderr, "channel %d: %s\n", n, port[n]->violations[0].c_str()), 1;
        const Stats& s = channel[n]->stats;
        latency += s.latency_cycles, bursts += s.read_bursts, hits += s.hits, closed += s.closed, misses += s.misses;
        refreshes += s.refreshes, worst = std::max(worst, s.latency_max);
    }
    std::printf("{\"cycles\": %llu, \"beats\": %llu, \"first_beat_cycles\": %llu, \"mean_latency_cycles\": %.2f, "
                "\"max_latency_cycles\": %llu, \"hits\": %llu, \"closed\": %llu, \"misses\": %llu, \"refreshes\": %llu, "
                "\"starved\": %llu, \"blocked\": %llu, \"full\": %llu}\n",
                (unsigned long long)(last - first + 1), (unsigned long long)taken, (unsigned long long)(first - accepted),
                double(latency) / bursts, (unsigned long long)worst, (unsigned long long)hits, (unsigned long long)closed,
                (unsigned long long)misses, (unsigned long long)refreshes, (unsigned long long)t.starved,
                (unsigned long long)t.blocked, (unsigned long long)t.full);
}
