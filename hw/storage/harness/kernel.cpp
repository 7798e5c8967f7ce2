// Streams packed beats from a file into an attention kernel and writes its output elements to another.
//
// usage: sim BEATS OUTPUTS COUNT SEED PAUSE_IN PAUSE_OUT
// BEATS: 64 bytes per beat, the packed payload in the low bytes. OUTPUTS: one 32-bit word per element.
// SEED and the two pause percentages make the idle cycles. Prints cycles from the first accepted beat to the last
// (Verilator writes a double underscore as ___05F.)
// output, both included, and the number of cycles in which a beat was offered but not taken.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "Vkernel.h"

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  std::vector<uint8_t> beats;
  FILE* in = std::fopen(argv[1], "rb");
  if (!in) return 3;
  std::fseek(in, 0, SEEK_END);
  beats.resize(std::ftell(in));
  std::rewind(in);
  if (std::fread(beats.data(), 1, beats.size(), in) != beats.size()) return 3;
  std::fclose(in);
  const size_t count = std::strtoull(argv[3], nullptr, 10);
  std::mt19937 random(std::strtoul(argv[4], nullptr, 10));
  const unsigned pause_in = std::atoi(argv[5]), pause_out = std::atoi(argv[6]);

  Vkernel dut;
  uint64_t cycle = 0, first = 0, blocked = 0;
  size_t at = 0, idle = 0;
  std::vector<uint32_t> outputs;
  dut.rst = 1;
  for (int n = 0; n < 3; n++) dut.clk = 0, dut.eval(), dut.clk = 1, dut.eval();
  dut.rst = 0;
  bool offered = false;
  while (outputs.size() < count && idle < 100000) {
    dut.clk = 0;
    if (!offered && at * 64 < beats.size() && random() % 100 >= pause_in) {
      std::memcpy(dut.i___05Fpayload.data(), &beats[at * 64], sizeof(dut.i___05Fpayload));
      offered = true;
    }
    dut.i___05Fvalid = offered;
    dut.o___05Fready = random() % 100 >= pause_out;
    dut.key___05Fready = 1;
    dut.eval();
    const bool taken = offered && dut.i___05Fready;
    blocked += offered && !taken;
    idle++;
    if (taken) {
      if (at++ == 0) first = cycle;
      offered = false;
      idle = 0;
    }
    if (dut.o___05Fvalid && dut.o___05Fready) outputs.push_back(dut.o___05Fpayload), idle = 0;
    dut.clk = 1;
    dut.eval();
    cycle++;
  }
  dut.final();
  FILE* out = std::fopen(argv[2], "wb");
  if (!out || std::fwrite(outputs.data(), 4, outputs.size(), out) != outputs.size()) return 3;
  std::fclose(out);
  std::printf("%llu %llu\n", (unsigned long long)(cycle - first), (unsigned long long)blocked);
  return outputs.size() == count ? 0 : 4;
}
