// Drives MatVecCore: plays the weight channels (with random gaps on request) and the vector buffer.
// Usage: sim job result. Files are little-endian; sw_stack/rtl/matvec.py writes and reads them.
#include "VMatVecCore.h"
#include "verilated.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Reader {
    std::ifstream in;
    explicit Reader(const char* path) : in(path, std::ios::binary) {
        if (!in) throw std::runtime_error(std::string("cannot read ") + path);
    }
    void bytes(void* to, size_t n) {
        in.read(static_cast<char*>(to), static_cast<std::streamsize>(n));
        if (static_cast<size_t>(in.gcount()) != n) throw std::runtime_error("the job file ends early");
    }
    uint32_t word() {
        uint32_t v;
        bytes(&v, 4);
        return v;
    }
};

struct Random {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state >> 33);
    }
};

struct Act { uint32_t addr; uint8_t codes[32]; uint8_t side[8]; };
struct Table { uint32_t addr, entry; };
struct Op { uint8_t bits[OP_BYTES]; };

template <typename Wide> void set(Wide& to, const void* from, size_t n) { std::memcpy(&to, from, n); }

int run(const char* job, const char* result) {
    Reader in(job);
    const uint32_t max_cycles = in.word(), gap = in.word(), seed = in.word(), vb_words = in.word();
    std::vector<Act> acts(in.word());
    for (auto& a : acts) a.addr = in.word(), in.bytes(a.codes, 32), in.bytes(a.side, 8);
    std::vector<Table> tables(in.word());
    for (auto& t : tables) t.addr = in.word(), t.entry = in.word();
    std::vector<Op> ops(in.word());
    for (auto& o : ops) in.bytes(o.bits, OP_BYTES);
    const uint32_t words = in.word();
    std::vector<std::vector<uint8_t>> channel(CHANNELS, std::vector<uint8_t>(64ull * words + 64));
    for (auto& c : channel) in.bytes(c.data(), 64ull * words);
    const size_t row = 4 * VECTOR_LANES;
    std::vector<uint8_t> vb(row * vb_words);
    in.bytes(vb.data(), vb.size());

    auto context = std::make_unique<VerilatedContext>();
    auto dut = std::make_unique<VMatVecCore>(context.get());
    auto* word_bytes = reinterpret_cast<uint8_t*>(&dut->words);
    std::vector<uint32_t> position(CHANNELS, 0);
    std::vector<uint8_t> offered(CHANNELS, 0);
    Random random{seed};
    uint64_t cycle = 0, start = 0, first = 0, last = 0, taken = 0, fired = 0, no_weights = 0, no_bank = 0;
    uint32_t accepted = 0, finished = 0, next_act = 0, next_table = 0;
    uint64_t end = 0;
    bool started = false;
    auto tick = [&] {
        dut->clk = 1, dut->eval();
        dut->clk = 0, dut->eval();
        ++cycle;
    };
    dut->clk = 0, dut->rst = 1;
    for (int i = 0; i < 4; ++i) tick();
    dut->rst = 0;
    while (finished < ops.size() && cycle < max_cycles && dut->error == 0) {
        dut->act_en = next_act < acts.size();
        if (dut->act_en) {
            const Act& a = acts[next_act++];
            dut->act_addr = a.addr;
            set(dut->act_codes, a.codes, 32), set(dut->act_side, a.side, 8);
        }
        dut->table_en = next_table < tables.size();
        if (dut->table_en) dut->table_addr = tables[next_table].addr, dut->table_entry = tables[next_table++].entry;
        const bool loaded = !dut->act_en && !dut->table_en;
        dut->op_valid = loaded && accepted < ops.size();
        if (dut->op_valid) set(dut->op, ops[accepted].bits, OP_BYTES);
        uint32_t valid = 0;
        for (uint32_t c = 0; c < CHANNELS; ++c) {
            if (!offered[c] && position[c] < words && (gap == 0 || random.next() % 256 >= gap)) {
                offered[c] = 1;
                std::memcpy(word_bytes + 64 * c, channel[c].data() + 64ull * position[c], 64);
            }
            valid |= static_cast<uint32_t>(offered[c]) << c;
        }
        dut->words_valid = valid;
        dut->eval();
        if (dut->op_valid && dut->op_ready) {
            ++accepted;
            if (!started) started = true, start = cycle;
        }
        const uint32_t moved = valid & dut->words_ready;
        for (uint32_t c = 0; c < CHANNELS; ++c)
            if (moved >> c & 1) offered[c] = 0, ++position[c];
        if (dut->taken) {
            if (!taken) first = cycle;
            ++taken, last = cycle;
        }
        fired += dut->fired, no_weights += dut->no_weights, no_bank += dut->no_bank;
        if (dut->done) ++finished, end = cycle;
        const bool read = dut->old_en;
        const uint64_t read_at = dut->old_addr;
        if (dut->y_en && dut->y_addr >= vb_words) throw std::runtime_error("a write past the vector buffer");
        std::vector<uint8_t> old(row);
        if (read) std::memcpy(old.data(), vb.data() + row * read_at, row);
        if (dut->y_en) std::memcpy(vb.data() + row * dut->y_addr, &dut->y_data, row);
        tick();
        if (read) set(dut->old_data, old.data(), row);
    }
    std::ofstream out(result, std::ios::binary);
    const uint64_t head[9] = {end - start + 1, taken, last - first + 1, fired, no_weights, no_bank,
                              finished, static_cast<uint64_t>(dut->error), cycle};
    out.write(reinterpret_cast<const char*>(head), sizeof head);
    out.write(reinterpret_cast<const char*>(vb.data()), static_cast<std::streamsize>(vb.size()));
    return out ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: sim job result\n"), 2;
    try {
        return run(argv[1], argv[2]);
    } catch (const std::exception& failure) {
        return std::fprintf(stderr, "%s\n", failure.what()), 1;
    }
}
