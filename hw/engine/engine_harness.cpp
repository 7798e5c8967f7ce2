// Runs the whole engine with its memories: images mapped from files, every port on the HBM model, no Python per cycle.
//
//   sim <memory model file>
//
// Commands on standard input, one per line; each answers one line of JSON or "error <sentence>":
//   channel <n> <path>            map a weight channel's image
//   aux <path>                    map auxiliary memory's image
//   write <byte> <path>           copy a file into auxiliary memory
//   read <byte> <size> <path>     copy auxiliary memory to a file
//   peek <n> <byte> <size> <path> copy a weight channel to a file
//   set <register> <value>        write a host register
//   get <register>                read a host register
//   run <program word> <cycles>   start and wait for the interrupt, at most so many cycles
//   profile <path>                from now on, write what units start and finish in each run: records of 32 bits,
//                                 cycle, units that took an operation, units that ended one; no path ends it
//   wave <first> <last> <path>    write a VCD waveform of cycles [first, last) of the next run (builds with WAVES)
//   abort <program word> <cycle>  start, abort in that cycle, wait for the interrupt
//   reset                         pulse the reset for a few cycles, in the middle of whatever goes on
#include "Vengine.h"
#include "hbm_model.h"
#include "hbm_pins.h"
#include "verilated.h"
#ifdef WAVES
#include "verilated_vcd_c.h"
#endif

#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

using namespace kvstrata;

namespace {

constexpr uint64_t kChannelBytes = 1ULL << 28, kAuxBytes = 1ULL << 30;
constexpr uint32_t kControl = 0, kStatus = 1, kError = 2, kErrorPc = 3, kProgram = 4, kCycles = 6, kCounters = 32;
constexpr uint32_t kInterrupt = 1u << 4;

struct Bus {
    Memory memory;
    Channel channel;
    ReadPort read;
    WritePort write;
    Bus(const Config& config, uint64_t bytes, uint32_t number)
        : memory(bytes), channel(config, number), read(config, memory, channel, 0, 2 * number),
          write(config, memory, channel, 0, 2 * number + 1) {}
};

class Machine {
public:
    explicit Machine(const std::string& text) : config_(text), top_(std::make_unique<Vengine>(&context_)) {
#ifdef WAVES
        context_.traceEverOn(true);
#endif
        for (uint32_t n = 0; n < KV_CHANNELS; n++) bus_.push_back(std::make_unique<Bus>(config_, kChannelBytes, n));
        aux_ = std::make_unique<Bus>(config_, kAuxBytes, KV_CHANNELS);
        reset();
    }
    void reset() {
        top_->rst = 1;
        top_->host___05Fwrite = 0;
        for (auto& b : bus_) b->read.reset(), b->write.reset();
        aux_->read.reset(), aux_->write.reset();
        for (int i = 0; i < 4; i++) tick();
        top_->rst = 0;
    }
    Memory& memory(uint32_t n) { return n == KV_CHANNELS ? aux_->memory : bus_.at(n)->memory; }
    void set(uint32_t address, uint32_t value) {
        top_->host___05Faddr = address, top_->host___05Fwdata = value, top_->host___05Fwrite = 1;
        tick();
        top_->host___05Fwrite = 0;
    }
    uint32_t get(uint32_t address) {
        top_->host___05Faddr = address;
        top_->eval();
        return top_->host___05Frdata;
    }
    // Cycles of the simulation until the interrupt, or `limit`.
    uint64_t run(uint32_t program, uint64_t limit, uint64_t abort_at) {
        set(kControl, 4), set(kProgram, program), set(kControl, 1);
        const uint64_t start = cycle_;
        start_ = start + 1;  // a register write takes effect a cycle after its transfer
        events.clear();
        while (cycle_ - start < limit) {
            if (cycle_ - start == abort_at) set(kControl, 2);
            tick();
            if (top_->__SYM__interrupt) break;
        }
        end_wave();
        return cycle_ - start;
    }
    // Units' starts and ends of the last run; the first cycle in which instructions may flow is 0.
    std::vector<uint32_t> events;
    bool profiling = false;
    void wave(uint64_t first, uint64_t last, const std::string& path) {
#ifdef WAVES
        first_ = first, last_ = last, wave_ = std::make_unique<VerilatedVcdC>();
        top_->trace(wave_.get(), 99);
        wave_->open(path.c_str());
#else
        (void)first, (void)last;
        throw std::runtime_error("this build writes no waveform " + path);
#endif
    }
    bool interrupted() const { return top_->__SYM__interrupt; }
    std::string violation() const {
        for (auto& b : bus_)
            for (auto* p : {static_cast<const Port*>(&b->read), static_cast<const Port*>(&b->write)})
                if (!p->violations.empty()) return p->violations[0];
        for (auto* p : {static_cast<const Port*>(&aux_->read), static_cast<const Port*>(&aux_->write)})
            if (!p->violations.empty()) return p->violations[0];
        return "";
    }
    uint64_t bytes_read() const {
        uint64_t sum = 0;
        for (auto& b : bus_) sum += b->channel.stats.bytes_read;
        return sum;
    }
    uint64_t bytes_written() const {
        uint64_t sum = 0;
        for (auto& b : bus_) sum += b->channel.stats.bytes_written;
        return sum;
    }

private:
    // A cycle, from its values to the edge that ends it. The memories' answers pass a register in front of the design
    // (build_harness, `registered`): they are set before the edge that begins their cycle.
    void tick() {
        Vengine& t = *top_;
        t.clk = 0;
        t.eval();
        if (profiling && (t.started | t.finished))
            events.insert(events.end(), {uint32_t(cycle_ - start_ - 1), t.started, t.finished});
        dump(0);
        if (!t.rst) {
#define CLOCK(n)                                                   \
    KV_CLOCK_READ(t, axi___05F##n, bus_[n]->read, cycle_);         \
    KV_CLOCK_WRITE(t, axi_write___05F##n, bus_[n]->write, cycle_);
            KV_EACH_CHANNEL(CLOCK)
            KV_CLOCK_READ(t, aux, aux_->read, cycle_);
            KV_CLOCK_WRITE(t, aux_write, aux_->write, cycle_);
        }
#define DRIVE(n) KV_DRIVE_READ(t, axi___05F##n, bus_[n]->read); KV_DRIVE_WRITE(t, axi_write___05F##n, bus_[n]->write);
        KV_EACH_CHANNEL(DRIVE)
        KV_DRIVE_READ(t, aux, aux_->read);
        KV_DRIVE_WRITE(t, aux_write, aux_->write);
        t.clk = 1;
        t.eval();
        dump(1);
        cycle_++;
    }
#ifdef WAVES
    void dump(int half) {
        if (wave_ && cycle_ - start_ - 1 >= first_ && cycle_ - start_ - 1 < last_) wave_->dump(2 * cycle_ + half);
    }
    void end_wave() {
        if (wave_) wave_->close(), wave_.reset();
    }
    std::unique_ptr<VerilatedVcdC> wave_;
    uint64_t first_ = 0, last_ = 0;
#else
    void dump(int) {}
    void end_wave() {}
#endif

    Config config_;
    VerilatedContext context_;
    std::unique_ptr<Vengine> top_;
    std::vector<std::unique_ptr<Bus>> bus_;
    std::unique_ptr<Bus> aux_;
    uint64_t cycle_ = 0, start_ = 0;
};

void copy_out(Memory& memory, uint64_t at, uint64_t size, const std::string& path) {
    if (at + size > memory.size()) throw std::runtime_error("a read leaves the memory");
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(memory.at(at)), static_cast<std::streamsize>(size));
    if (!out) throw std::runtime_error("cannot write " + path);
}

void copy_in(Memory& memory, uint64_t at, const std::string& path) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    if (!in) throw std::runtime_error("cannot read " + path);
    const uint64_t size = static_cast<uint64_t>(in.tellg());
    if (at + size > memory.size()) throw std::runtime_error("a write leaves the memory");
    in.seekg(0);
    in.read(reinterpret_cast<char*>(memory.at(at)), static_cast<std::streamsize>(size));
}

std::string profile_path;

std::string report(Machine& m, uint64_t waited) {
    if (m.profiling) {
        std::ofstream out(profile_path, std::ios::binary);
        out.write(reinterpret_cast<const char*>(m.events.data()), std::streamsize(4 * m.events.size()));
        if (!out) throw std::runtime_error("cannot write " + profile_path);
    }
    std::ostringstream out;
    out << "{\"interrupt\": " << (m.interrupted() ? "true" : "false") << ", \"state\": " << (m.get(kStatus) & 15)
        << ", \"error\": " << m.get(kError) << ", \"error_pc\": " << m.get(kErrorPc) << ", \"cycles\": " << m.get(kCycles)
        << ", \"waited\": " << waited << ", \"bytes_read\": " << m.bytes_read() << ", \"bytes_written\": " << m.bytes_written()
        << ", \"violation\": \"" << m.violation() << "\", \"counters\": [";
    for (uint32_t c = 0; c < COUNTERS; c++) out << (c ? ", " : "") << m.get(kCounters + c);
    out << "]}";
    return out.str();
}

std::string obey(Machine& m, std::istringstream& in) {
    std::string verb, path;
    uint64_t a = 0, b = 0, n = 0;
    in >> verb;
    if (verb == "channel" && in >> n >> path) return m.memory(n).load(path, 0), "{}";
    if (verb == "aux" && in >> path) return m.memory(KV_CHANNELS).load(path, 0), "{}";
    if (verb == "write" && in >> a >> path) return copy_in(m.memory(KV_CHANNELS), a, path), "{}";
    if (verb == "read" && in >> a >> b >> path) return copy_out(m.memory(KV_CHANNELS), a, b, path), "{}";
    if (verb == "peek" && in >> n >> a >> b >> path) return copy_out(m.memory(n), a, b, path), "{}";
    if (verb == "set" && in >> a >> b) return m.set(a, b), "{}";
    if (verb == "get" && in >> a) return std::to_string(m.get(a));
    if (verb == "run" && in >> a >> b) return report(m, m.run(a, b, ~0ULL));
    if (verb == "abort" && in >> a >> b) return report(m, m.run(a, b + 1000000, b));
    if (verb == "profile") return m.profiling = bool(in >> profile_path), "{}";
    if (verb == "wave" && in >> a >> b >> path) return m.wave(a, b, path), "{}";
    if (verb == "reset") return m.reset(), "{}";
    throw std::runtime_error("unknown or incomplete command: " + verb);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: sim memory_model\n"), 2;
    try {
        std::ifstream file(argv[1]);
        if (!file) throw std::runtime_error("cannot read the memory model");
        Machine machine(std::string((std::istreambuf_iterator<char>(file)), {}));
        for (std::string line; std::getline(std::cin, line);) {
            std::istringstream words(line);
            try {
                std::cout << obey(machine, words) << std::endl;
            } catch (const std::exception& failure) {
                std::cout << "error " << failure.what() << std::endl;
            }
        }
    } catch (const std::exception& failure) {
        return std::fprintf(stderr, "%s\n", failure.what()), 1;
    }
}
