// The whole in-storage unit behind its flash: channels, group buffer and the firmware's maps from files.
//
// usage: sim SCRIPT FLASH_IMAGE DRAM_IMAGE MAP RESULTS [name=value ...]
//
// SCRIPT: records of a 32-bit kind, a 32-bit number of operand beats, 16 bytes (config or command), then the operand
// beats of 32 bytes. Kind 0: config; 1: command, given when the unit takes it; 2: abort, `operands` cycles later;
// 3: reset of unit, channels and maps' answers after `operands` cycles in which nothing is given; open commands are lost.
// MAP: 64-bit key (PAGE_REQUEST fields sequence, kv_head, kind, index: see key_of), 32-bit page, 32-bit flags (1: DRAM).
// RESULTS: text, a line per event: "o KERNEL ID QUERY ELEMENT BITS", "m ID QUERY MAXIMUM SUM" with a query's element 0, "c CYCLE ID SEQUENCE HEAD STATUS FIELD INDEX",
// "s STATUS FIELD" for a config, "r CHANNEL PAGE" for a read, "n CYCLES" and "k COUNTER..." at the end. Flash parameters are those of FlashParams;
// pause_out and pause_map (requests and answers) are percentages of idle cycles, map_latency cycles from a request to its answer, pause_seed,
// reset_cycles (hw/storage/timing.py). Gives up after `limit` cycles, or 400,000 in which no page is asked for or moves and
// nothing comes out; or at once, if a request is withdrawn or changed before it is taken.
// (Verilator writes a double underscore as ___05F.)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "Vunit.h"
#include "flash_model.h"

using namespace kvstrata;

struct Port {
  uint8_t *command_valid, *command_ready, *beat_valid, *grant_valid[2], *grant[2];
  uint64_t* command;
  uint32_t* beat;
};

#define PORT(n)                                                                                             \
  ports.push_back({&dut.flash___05F##n##___05Fvalid, &dut.flash___05F##n##___05Fready,                       \
                   &dut.beat___05F##n##___05Fvalid,                                                          \
                   {&dut.grant___05F##n##___05F0___05Fvalid, &dut.grant___05F##n##___05F1___05Fvalid},       \
                   {&dut.grant___05F##n##___05F0___05Fpayload, &dut.grant___05F##n##___05F1___05Fpayload},   \
                   &dut.flash___05F##n##___05Fpayload, dut.beat___05F##n##___05Fpayload.data()});

struct Step {
  uint32_t kind, operands;
  uint8_t record[16];
  std::vector<uint8_t> beats;
};

static std::vector<uint8_t> slurp(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) std::fprintf(stderr, "cannot open %s\n", path), std::exit(3);
  std::fseek(file, 0, SEEK_END);
  std::vector<uint8_t> bytes(std::ftell(file));
  std::rewind(file);
  if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::exit(3);
  std::fclose(file);
  return bytes;
}

static uint64_t bits(const uint32_t* words, unsigned lsb, unsigned width) {
  uint64_t value = 0;
  for (unsigned n = 0; n < width; n++) value |= uint64_t(words[(lsb + n) / 32] >> ((lsb + n) % 32) & 1) << n;
  return value;
}

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  FlashParams params;
  long pause_out = 0, pause_map = 0, map_latency = 40, seed = 1, limit = 40000000, dram_mb = 4000, reset_cycles = 1;
  for (int n = 6; n < argc; n++) {
    const std::string word = argv[n], name = word.substr(0, word.find('='));
    const long value = std::stol(word.substr(word.find('=') + 1));
    if (name == "pause_out") pause_out = value;
    else if (name == "pause_map") pause_map = value;
    else if (name == "map_latency") map_latency = value;
    else if (name == "pause_seed") seed = value;
    else if (name == "limit") limit = value;
    else if (name == "dram_mb_per_s") dram_mb = value;
    else if (name == "reset_cycles") reset_cycles = value;
    else if (!params.set(word)) return 2;
  }
  FlashImage flash(argv[2]), dram(argv[3]);
  std::unordered_map<uint64_t, std::pair<uint32_t, uint32_t>> maps;
  const auto map_bytes = slurp(argv[4]);
  for (size_t at = 0; at + 16 <= map_bytes.size(); at += 16) {
    uint64_t key;
    uint32_t page, flags;
    std::memcpy(&key, &map_bytes[at], 8), std::memcpy(&page, &map_bytes[at + 8], 4), std::memcpy(&flags, &map_bytes[at + 12], 4);
    maps[key] = {page, flags};
  }
  std::deque<Step> steps;
  const auto script = slurp(argv[1]);
  size_t expected = 0;
  for (size_t at = 0; at < script.size();) {
    Step step;
    std::memcpy(&step.kind, &script[at], 4), std::memcpy(&step.operands, &script[at + 4], 4);
    std::memcpy(step.record, &script[at + 8], 16);
    at += 24;
    if (step.kind == 1) {
      step.beats.assign(&script[at], &script[at] + 32 * step.operands);
      at += 32 * step.operands;
      expected++;
    }
    steps.push_back(step);
  }
  std::mt19937 random(seed);
  std::FILE* out = std::fopen(argv[5], "w");

  Vunit dut;
  std::vector<Port> ports;
  PORT(0) PORT(1)
#if PORTS > 2
  PORT(2)
#endif
#if PORTS > 4
  PORT(3) PORT(4)
#endif
#if PORTS > 8
  PORT(5) PORT(6) PORT(7) PORT(8)
#endif
  // The group buffer answers like a channel without an array: DRAM time only.
  FlashParams buffer = params;
  buffer.channel_mb_per_s = dram_mb, buffer.read_ns = 200, buffer.command_ns = 20, buffer.ecc_ns = 0;
  buffer.retry_per_million = 0, buffer.fail_per_million = 0;
  std::vector<std::unique_ptr<FlashChannel>> channels;
  auto reset = [&] {
    channels.clear();
    for (size_t n = 0; n < ports.size(); n++) {
      const bool last = n + 1 == ports.size();
      channels.push_back(std::make_unique<FlashChannel>(last ? buffer : params, last ? dram : flash));
    }
    dut.rst = 1;
    for (long n = 0; n < reset_cycles; n++) dut.clk = 0, dut.eval(), dut.clk = 1, dut.eval();
    dut.rst = dut.clk = 0;
    dut.eval();
  };
  reset();
  long cycle = 0, completions = 0, abort_in = -1, start = -1, last = 0;
  size_t operand = 0, issued = 0;
  bool command_given = false, withdrawn = false;
  std::vector<uint32_t> offered;  // the request that was not taken in the last cycle
  std::deque<std::pair<long, uint64_t>> answers;  // due cycle, descriptor
  while ((size_t(completions) < expected || !steps.empty()) && cycle < limit && cycle - last < 400000) {
    dut.clk = 0;
    dut.config___05Fvalid = 0, dut.command___05Fvalid = 0, dut.operand___05Fvalid = 0, dut.cancel = 0;
    if (abort_in >= 0 && abort_in-- == 0) dut.cancel = 1;
    if (!steps.empty() && steps.front().kind == 3 && steps.front().operands-- == 0) {
      steps.pop_front();
      answers.clear();
      expected -= issued - completions;
      issued = completions;
      offered.clear();
      reset();
    }
    if (!steps.empty()) {
      Step& step = steps.front();
      if (step.kind == 0) {
        std::memcpy(&dut.config___05Fpayload, step.record, 8);
        dut.config___05Fvalid = 1;
      } else if (step.kind == 2) {
        abort_in = step.operands;
        steps.pop_front();
      } else if (step.kind == 3) {
      } else if (!command_given) {
        std::memcpy(dut.command___05Fpayload.data(), step.record, 16);
        dut.command___05Fvalid = 1;
      } else {
        std::memcpy(dut.operand___05Fpayload.data(), &step.beats[32 * operand], 32);
        dut.operand___05Fvalid = 1;
      }
    }
    const bool answer = !answers.empty() && answers.front().first <= cycle && random() % 100 >= unsigned(pause_map);
    dut.descriptor___05Fvalid = answer;
    if (answer) dut.descriptor___05Fpayload = answers.front().second;
    dut.request___05Fready = answers.size() < 64 && random() % 100 >= unsigned(pause_map);
    dut.output___05F0___05Fready = random() % 100 >= unsigned(pause_out);
    dut.output___05F1___05Fready = random() % 100 >= unsigned(pause_out);
    dut.completion___05Fready = 1;
    for (size_t n = 0; n < ports.size(); n++) {
      *ports[n].command_ready = channels[n]->command_ready();
      *ports[n].beat_valid = channels[n]->valid();
      if (channels[n]->valid()) {
        const FlashBeat beat = channels[n]->beat();
        ports[n].beat[0] = uint32_t(beat.data), ports[n].beat[1] = uint32_t(beat.data >> 32);
        ports[n].beat[2] = beat.first | beat.last << 1 | beat.fail << 2 | beat.slot << 3 | beat.kernel << 7;
      }
    }
    dut.eval();
    if (!steps.empty()) {
      if (dut.config___05Fvalid) steps.pop_front();
      else if (dut.command___05Fvalid && dut.command___05Fready) {
        if (start < 0) start = cycle;
        issued++;
        command_given = steps.front().operands != 0;
        operand = 0;
        if (!command_given) steps.pop_front();
      } else if (dut.operand___05Fvalid && dut.operand___05Fready && ++operand == steps.front().operands) {
        command_given = false;
        steps.pop_front();
      }
    }
    if (answer && dut.descriptor___05Fready) answers.pop_front();
    const std::vector<uint32_t> request_now(dut.request___05Fpayload.data(), dut.request___05Fpayload.data() + sizeof(dut.request___05Fpayload) / 4);
    if (!offered.empty() && (!dut.request___05Fvalid || request_now != offered)) {
      std::fprintf(stderr, "cycle %ld: a page request was %s before it was taken", cycle - start, dut.request___05Fvalid ? "changed" : "withdrawn");
      withdrawn = true;
      break;
    }
    offered.clear();
    if (dut.request___05Fvalid && !dut.request___05Fready) offered = request_now;
    if (dut.request___05Fvalid && dut.request___05Fready) {
      const uint32_t* request = dut.request___05Fpayload.data();
      // key: kind (2), kv_head (8), sequence (12), index (17): the low 39 bits of PAGE_REQUEST
      const auto found = maps.find(bits(request, 0, 39));
      uint64_t descriptor = 0;
      if (found != maps.end()) descriptor = found->second.first | 1ull << 32 | uint64_t(found->second.second & 1) << 33;
      answers.push_back({cycle + map_latency, descriptor});
    }
    for (size_t n = 0; n < ports.size(); n++) {
      const bool commanded = *ports[n].command_valid && *ports[n].command_ready;
      const uint32_t page = uint32_t(*ports[n].command);
      if (commanded) std::fprintf(out, "r %zu %u\n", n, page);
      if (commanded || channels[n]->valid()) last = cycle;
      for (unsigned kernel = 0; kernel < 2; kernel++)
        if (*ports[n].grant_valid[kernel]) channels[n]->grant(kernel, *ports[n].grant[kernel]);
      channels[n]->tick(commanded, page, unsigned(*ports[n].command >> 32));
    }
    auto output = [&](int kernel, uint8_t valid, uint8_t ready, uint64_t word, const uint32_t* softmax) {
      if (!valid || !ready) return;
      std::fprintf(out, "o %d %u %u %u %u\n", kernel, unsigned(word >> 27 & 0xffff), unsigned(word >> 16 & 7), unsigned(word >> 19 & 127), unsigned(word & 0xffff));
      if ((word >> 19 & 127) == 0)
        std::fprintf(out, "m %u %u %d %llu\n", unsigned(word >> 27 & 0xffff), unsigned(word >> 16 & 7), int(bits(softmax, 0, 14) << 18) >> 18, (unsigned long long)bits(softmax, 14, 58));
      last = cycle;
    };
    output(0, dut.output___05F0___05Fvalid, dut.output___05F0___05Fready, dut.output___05F0___05Fpayload, dut.softmax___05F0.data());
    output(1, dut.output___05F1___05Fvalid, dut.output___05F1___05Fready, dut.output___05F1___05Fpayload, dut.softmax___05F1.data());
    if (dut.config_done) std::fprintf(out, "s %u %u\n", dut.config_status & 0xff, dut.config_status >> 8);
    if (dut.completion___05Fvalid) {
      const uint32_t* c = dut.completion___05Fpayload.data();
      std::fprintf(out, "c %ld %u %u %u %u %u %u\n", cycle - start, unsigned(bits(c, 0, 16)), unsigned(bits(c, 16, 12)), unsigned(bits(c, 28, 8)), unsigned(bits(c, 36, 8)), unsigned(bits(c, 44, 8)), unsigned(bits(c, 52, 17)));
      completions++;
      last = cycle;
    }
    dut.clk = 1;
    dut.eval();
    cycle++;
  }
  std::fprintf(out, "n %ld\n", cycle - start);
  std::fprintf(out, "k %llu %llu %llu %llu %llu %llu %llu %llu\n", (unsigned long long)dut.counters___05F0, (unsigned long long)dut.counters___05F1, (unsigned long long)dut.counters___05F2, (unsigned long long)dut.counters___05F3, (unsigned long long)dut.counters___05F4, (unsigned long long)dut.counters___05F5, (unsigned long long)dut.counters___05F6, (unsigned long long)dut.counters___05F7);
  std::fclose(out);
  dut.final();
  return withdrawn ? 5 : size_t(completions) == expected ? 0 : 4;
}
