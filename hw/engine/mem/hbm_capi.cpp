// C interface of the memory model, for Python test benches: the model they run is the one of the C++ harness.
#include "hbm_model.h"

#include <memory>

using namespace kvstrata;

namespace {
struct Bench {
    Config config;
    Memory memory;
    Channel channel;
    ReadPort read;
    WritePort write;
    Bench(const char* text, uint64_t bytes, uint64_t base, uint32_t number)
        : config(text), memory(bytes), channel(config, number), read(config, memory, channel, base, 2 * number),
          write(config, memory, channel, base, 2 * number + 1) {}
};
thread_local std::string error;
}  // namespace

struct ReadPins {
    uint8_t arready, rvalid, rlast, rresp;
    uint32_t rid;
    uint8_t rdata[64];
};
struct WritePins {
    uint8_t awready, wready, bvalid, bresp;
    uint32_t bid;
};

extern "C" {
const char* kv_error() { return error.c_str(); }

Bench* kv_new(const char* text, uint64_t bytes, uint64_t base, uint32_t number) {
    try {
        return new Bench(text, bytes, base, number);
    } catch (const std::exception& failure) {
        error = failure.what();
        return nullptr;
    }
}
void kv_delete(Bench* b) { delete b; }
uint8_t* kv_memory(Bench* b) { return b->memory.at(0); }
int kv_load(Bench* b, const char* path, uint64_t offset) {
    try {
        b->memory.load(path, offset);
        return 0;
    } catch (const std::exception& failure) {
        error = failure.what();
        return 1;
    }
}
uint64_t kv_serve(Bench* b, uint64_t cycle, uint64_t address, uint32_t bytes, int write) {
    return b->channel.serve(cycle, address, bytes, write);
}
void kv_reset(Bench* b) { b->read.reset(), b->write.reset(); }
void kv_stats(Bench* b, Stats* out) { *out = b->channel.stats; }
int kv_idle(Bench* b) { return b->read.idle() && b->write.idle(); }
const char* kv_violation(Bench* b) {
    auto& found = b->read.violations.empty() ? b->write.violations : b->read.violations;
    return found.empty() ? nullptr : found.front().c_str();
}
void kv_read_clock(Bench* b, uint64_t cycle, int arvalid, uint64_t araddr, uint32_t arlen, uint32_t arsize,
                   uint32_t arburst, uint32_t arid, int rready, ReadPins* out) {
    ReadPort& p = b->read;
    p.clock(cycle, arvalid, araddr, arlen, arsize, arburst, arid, rready);
    *out = {p.arready, p.rvalid, p.rlast, p.rresp, p.rid, {}};
    if (p.rvalid) std::memcpy(out->rdata, p.rdata, 1u << arsize);
}
void kv_write_clock(Bench* b, uint64_t cycle, int awvalid, uint64_t awaddr, uint32_t awlen, uint32_t awsize,
                    uint32_t awburst, uint32_t awid, int wvalid, const uint8_t* wdata, uint64_t wstrb, int wlast,
                    int bready, WritePins* out) {
    WritePort& p = b->write;
    p.clock(cycle, awvalid, awaddr, awlen, awsize, awburst, awid, wvalid, wdata, wstrb, wlast, bready);
    *out = {p.awready, p.wready, p.bvalid, p.bresp, p.bid};
}
}
