// Drives two builds of a row pair with the same random steps and activations; prints how many results it compared.
// All positions at once, then one after the other alone: a sum shows each of its terms without the others.
#include "Vpair_twins.h"
#include "verilated.h"

#include <cstdint>
#include <cstdio>
#include <cstring>

constexpr int TOGETHER = 20000, ALONE = 500;

int main() {
    VerilatedContext context;
    Vpair_twins top(&context);
    uint64_t state = 1;
    auto random = [&] {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state >> 32);
    };
    uint8_t bytes[STIMULUS_BYTES];
    uint32_t valid = 0, compared = 0;
    for (int cycle = 0; cycle < TOGETHER + POSITIONS * ALONE; ++cycle) {
        for (auto& b : bytes) b = random() % 5 ? random() : (random() % 2 ? 0x7f : 0x81);
        for (int j = 0; cycle >= TOGETHER && j < POSITIONS; ++j)  // the first bytes are the shared activations
            if (j != (cycle - TOGETHER) / ALONE) bytes[j] = 0;
        std::memcpy(&top.stimulus, bytes, sizeof bytes);
        top.load = random() % 3 == 0, top.sparse = random() % 2, top.valid = random() % 4 != 0;
        top.clk = 0, top.eval();
        // The weights of a load meet the activations of the next cycle; results come `LATENCY` cycles after those.
        valid = valid << 1 | top.valid;
        if (cycle > 2 * LATENCY && valid >> LATENCY & 1) {
            ++compared;
            if (top.differ) return std::fprintf(stderr, "results differ in cycle %d\n", cycle), 1;
        }
        top.clk = 1, top.eval();
    }
    std::printf("%u\n", compared);
}
