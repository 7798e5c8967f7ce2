// Simulated HBM behind AXI4 ports: memory contents, DRAM timing and protocol checks.
//
// One ReadPort and one WritePort per AXI port; ports of one pseudo-channel share a Channel (its timing) and a
// Memory (its contents). Parameters come from golden/spec/memory.py as text, so there is no second set of defaults.
//
// A port is a registered machine: it drives the signals of cycle c + 1 from what it saw in cycle c. Call order per
// clock: drive the ports' outputs into the design, evaluate, let the clock rise, then `clock()` with the values that
// the design held before the edge. Nothing in here depends on host time or address layout.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvstrata {

// --- parameters --------------------------------------------------------------------------------------
struct Config {
    std::string mode;
    std::map<std::string, int64_t> values;

    // Lines "name value"; a missing name is an error when it is first asked for.
    explicit Config(const std::string& text) {
        std::istringstream lines(text);
        std::string name, value;
        while (lines >> name >> value) {
            if (name == "mode") mode = value;
            else values[name] = std::stoll(value);
        }
    }
    int64_t at(const std::string& name) const {
        auto found = values.find(name);
        if (found == values.end()) throw std::runtime_error("the memory model needs a value for " + name);
        return found->second;
    }
};

// --- contents ----------------------------------------------------------------------------------------
class Memory {
public:
    explicit Memory(uint64_t bytes) : bytes_(bytes) {
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::runtime_error("cannot reserve simulated memory of " + std::to_string(bytes));
        data_ = static_cast<uint8_t*>(at);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { munmap(data_, bytes_); }

    // Map a file at `offset`, copy on write: the file never changes. Unaligned offsets are copied.
    void load(const std::string& path, uint64_t offset) {
        int fd = open(path.c_str(), O_RDONLY);
        struct stat info{};
        if (fd < 0 || fstat(fd, &info)) throw std::runtime_error("cannot read memory image " + path);
        uint64_t size = info.st_size;
        if (offset + size > bytes_) {
            close(fd);
            throw std::runtime_error("memory image " + path + " does not fit: it ends at byte " +
                                     std::to_string(offset + size) + " of " + std::to_string(bytes_));
        }
        if (size && offset % 4096 == 0) {
            void* at = mmap(data_ + offset, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0);
            close(fd);
            if (at == MAP_FAILED) throw std::runtime_error("cannot map memory image " + path);
            return;
        }
        for (uint64_t done = 0; done < size;) {
            ssize_t got = ::read(fd, data_ + offset + done, size - done);
            if (got <= 0) throw std::runtime_error("cannot read memory image " + path);
            done += got;
        }
        close(fd);
    }
    uint8_t* at(uint64_t address) { return data_ + address; }
    uint64_t size() const { return bytes_; }

private:
    uint64_t bytes_;
    uint8_t* data_;
};

// --- DRAM timing -------------------------------------------------------------------------------------
struct Stats {
    uint64_t accesses = 0, hits = 0, closed = 0, misses = 0, refreshes = 0, turnarounds = 0;
    uint64_t read_bursts = 0, write_bursts = 0, bytes_read = 0, bytes_written = 0;
    uint64_t latency_cycles = 0, latency_max = 0;
};

// A number of things as a divisor that hardware has: powers of two divide by shifts.
class Count {
public:
    explicit Count(int64_t count) : count_(count) {
        if (count < 1) throw std::runtime_error("the memory model counts from 1, not " + std::to_string(count));
        while (1LL << shift_ < count) shift_++;
        power_ = 1LL << shift_ == count;
    }
    uint64_t of(uint64_t value) const {
        if (power_) [[likely]] return value >> shift_;
        return value / count_;
    }
    uint64_t rest(uint64_t value) const {
        if (power_) [[likely]] return value & (count_ - 1);
        return value % count_;
    }
    int64_t count() const { return count_; }

private:
    int64_t count_;
    int shift_ = 0;
    bool power_ = false;
};

// One pseudo-channel with a controller that serves the oldest access first and lets younger ones (up to `lookahead`
// of them) use the command and data slots that older ones leave free, as a first-ready scheduler does; they retire
// and answer in order. All-bank refresh every tREFI, phase by channel number.
class Channel {
public:
    Channel(const Config& config, uint32_t number)
        : ck_(config.at("t_ck_ps")), groups_(config.at("bank_groups")), per_group_(config.at("banks_per_group")),
          access_bytes_(config.at("access_bytes")), page_bytes_(groups_.count() * config.at("row_bytes")),
          ccd_s_(config.at("t_ccd_s_ck") * ck_), ccd_l_(config.at("t_ccd_l_ck") * ck_), cl_(config.at("t_cl_ps")),
          cwl_(config.at("t_cwl_ps")), rcd_(config.at("t_rcd_ps")), rp_(config.at("t_rp_ps")),
          ras_(config.at("t_ras_ps")), rrd_s_(config.at("t_rrd_s_ps")), rrd_l_(config.at("t_rrd_l_ps")),
          faw_(config.at("t_faw_ps")), rtp_(config.at("t_rtp_ps")), wr_(config.at("t_wr_ps")),
          wtr_s_(config.at("t_wtr_s_ps")), wtr_l_(config.at("t_wtr_l_ps")), refi_(config.at("t_refi_ps")),
          rfc_(config.at("t_rfc_ps")), return_(config.at("return_ps")), khz_(config.at("user_clock_khz")),
          window_(config.at("lookahead"), kNever), banks_(groups_.count() * per_group_.count()) {
        next_refresh_ = refi_ * (number % 32 + 1) / 32;
    }

    // User cycle in which the last byte of [address, address + bytes) is with the user (read) or safe (write).
    uint64_t serve(uint64_t cycle, uint64_t address, uint32_t bytes, bool write) {
        return (served(arrival(cycle), address, bytes, write) + kPerCycle - 1) / kPerCycle;
    }
    // The same as a fraction of a cycle, in units of 1 / kPerCycle, of an access that arrives at a time of `arrival`.
    int64_t served(int64_t arrival, uint64_t address, uint32_t bytes, bool write) {
        int64_t done = 0;
        for (uint64_t a = address - access_bytes_.rest(address); a < address + bytes; a += access_bytes_.count())
            done = access(arrival, a, write);
        return (done + return_) * khz_;
    }
    int64_t arrival(uint64_t cycle) const { return cycle * kPerCycle / khz_; }
    static constexpr int64_t kPerCycle = 1000000000LL;
    Stats stats;

private:
    static constexpr int64_t kNever = INT64_MIN / 4;
    struct Bank {
        int64_t row = -1, activated = kNever, may_precharge = kNever, may_activate = kNever;
    };
    struct Plan {
        int64_t activate, column;
        int gap;  // index of the idle slot that the column uses, -1 for the end
    };

    // Address bits, low to high: bank group, column, bank, row: a stream visits all groups before it repeats one.
    void decode(uint64_t address, int64_t& group, int64_t& bank, int64_t& row) const {
        const uint64_t page = page_bytes_.of(address);
        group = groups_.rest(access_bytes_.of(address));
        bank = per_group_.rest(page) * groups_.count() + group;
        row = per_group_.of(page);
    }

    struct Activate {
        int64_t time, group;
    };
    // Idle data slots between two columns of one direction, before the newest column.
    struct Gap {
        int64_t before, before_group, after, after_group;
    };

    Plan plan(const Bank& bank, int64_t group, int64_t row, int64_t ready, bool write) const {
        Plan p{bank.activated, ready, -1};
        if (bank.row != row) [[unlikely]] {
            int64_t start = bank.row < 0 ? ready : std::max(ready, bank.may_precharge) + rp_;
            p.activate = activate_slot(std::max(start, bank.may_activate), group);
        }
        place_column(p, std::max(ready, p.activate + rcd_), group, write);
        return p;
    }

    // Earliest time from `start` that keeps tRRD to every activate and tFAW over every five.
    [[gnu::noinline]] int64_t activate_slot(int64_t start, int64_t group) const {
        const int64_t reach = std::max({faw_, rrd_s_, rrd_l_});
        for (bool moved = true; moved;) {
            moved = false;
            size_t near = 0;
            int64_t next = INT64_MAX;
            for (const Activate& other : activates_) {
                const int64_t apart = std::abs(other.time - start);
                if (apart >= reach) continue;
                int64_t spacing = other.group == group ? rrd_l_ : rrd_s_;
                if (apart < spacing) {
                    start = other.time + spacing, moved = true;
                } else if (apart < faw_) {
                    near++;
                    if (other.time + faw_ > start) next = std::min(next, other.time + faw_);
                }
            }
            if (moved) continue;
            // Conservative: four neighbours on both sides together close the window.
            if (near >= 4 && crowded(start)) start = next, moved = true;
        }
        return start;
    }
    bool crowded(int64_t time) const {
        std::vector<int64_t> times{time};
        for (const Activate& other : activates_)
            if (std::abs(other.time - time) < faw_) times.push_back(other.time);
        std::sort(times.begin(), times.end());
        for (size_t n = 0; n + 4 < times.size(); n++)
            if (times[n] <= time && time <= times[n + 4] && times[n + 4] - times[n] < faw_) return true;
        return false;
    }

    int64_t spacing(int64_t a, int64_t b) const { return a == b ? ccd_l_ : ccd_s_; }

    void place_column(Plan& p, int64_t start, int64_t group, bool write) const {
        int64_t turn = 0;
        if (write == last_was_write_) [[likely]] {
            if (last_gap_end_ >= start + std::min(ccd_s_, ccd_l_) && fits_gap(p, start, group)) [[unlikely]] return;
        } else {
            turn = write ? cl_ + ccd_s_ + 2 * ck_ - cwl_ : cwl_ + ccd_s_ + (group == last_group_ ? wtr_l_ : wtr_s_);
        }
        p.column = std::max(start, last_column_ + std::max(turn, spacing(last_group_, group)));
    }

    // The first idle slot that a column from `start` fits into.
    [[gnu::noinline]] bool fits_gap(Plan& p, int64_t start, int64_t group) const {
        for (size_t n = 0; n < gaps_.size(); n++) {
            const Gap& gap = gaps_[n];
            const int64_t at = std::max(start, gap.before + spacing(gap.before_group, group));
            if (at + spacing(group, gap.after_group) > gap.after) continue;
            p.column = at;
            p.gap = int(n);
            return true;
        }
        return false;
    }

    void take_column(const Plan& p, int64_t group, bool write) {
        if (p.gap >= 0) [[unlikely]] {
            Gap old = gaps_[p.gap];
            gaps_.erase(gaps_.begin() + p.gap);
            keep_gap({old.before, old.before_group, p.column, group});
            keep_gap({p.column, group, old.after, old.after_group});
            return;
        }
        if (write != last_was_write_ && stats.accesses) [[unlikely]] {
            gaps_.clear();
            stats.turnarounds++;
        } else {
            keep_gap({last_column_, last_group_, p.column, group});
        }
        last_column_ = p.column;
        last_was_write_ = write;
        last_group_ = group;
    }
    void keep_gap(const Gap& gap) {
        if (gap.after - gap.before >= 2 * ccd_s_) [[unlikely]] push_gap(gap);
    }
    [[gnu::noinline]] void push_gap(const Gap& gap) {
        if (gaps_.size() == window_.size()) gaps_.erase(gaps_.begin());
        gaps_.push_back(gap);
        last_gap_end_ = std::max(last_gap_end_, gap.after);
    }

    void refresh() {
        int64_t start = std::max(next_refresh_, last_column_ + cl_ + ccd_s_);
        for (auto& bank : banks_)
            if (bank.row >= 0) start = std::max(start, bank.may_precharge);
        for (auto& bank : banks_) {
            bank.row = -1;
            bank.may_activate = start + rp_ + rfc_;
        }
        gaps_.clear();
        next_refresh_ += refi_;
        stats.refreshes++;
    }

    int64_t access(int64_t arrival, uint64_t address, bool write) {
        int64_t group, index, row;
        decode(address, group, index, row);
        Bank& bank = banks_[index];
        int64_t& slot = window_[next_];
        next_ = next_ + 1 == window_.size() ? 0 : next_ + 1;
        const int64_t ready = std::max(arrival, slot);
        Plan p;
        while ((p = plan(bank, group, row, ready, write)).column >= next_refresh_) [[unlikely]] refresh();
        if (bank.row == row) [[likely]] {
            stats.hits++;
        } else {
            (bank.row < 0 ? stats.closed : stats.misses)++;
            bank.row = row;
            bank.activated = p.activate;
            bank.may_precharge = p.activate + ras_;
            if (activates_.size() == window_.size() + 8) activates_.pop_front();
            activates_.push_back({p.activate, group});
        }
        take_column(p, group, write);
        int64_t data_end = p.column + (write ? cwl_ : cl_) + ccd_s_;
        bank.may_precharge = std::max(bank.may_precharge, write ? data_end + wr_ : p.column + rtp_);
        slot = retired_ = std::max(retired_, p.column);
        stats.accesses++;
        return data_end;
    }

    int64_t ck_;
    Count groups_, per_group_, access_bytes_, page_bytes_;
    int64_t ccd_s_, ccd_l_, cl_, cwl_, rcd_, rp_, ras_, rrd_s_, rrd_l_, faw_, rtp_, wr_, wtr_s_, wtr_l_, refi_, rfc_,
        return_, khz_;
    std::vector<int64_t> window_;
    size_t next_ = 0;
    std::vector<Bank> banks_;
    // The last `lookahead` activates and a window's worth before them: a younger access starts no earlier than the
    // retirement of the one `lookahead` before it, so older ones cannot matter.
    std::deque<Activate> activates_;
    std::vector<Gap> gaps_;
    int64_t last_gap_end_ = kNever;  // no slot ends later: a stream's next access need not look at any
    int64_t retired_ = kNever, last_column_ = kNever, last_group_ = -1, next_refresh_ = 0;
    bool last_was_write_ = false;
};

// --- behaviour of ports ------------------------------------------------------------------------------
// xorshift: the same stalls for a seed on every machine.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ULL + 0x1234567ULL) {}
    uint64_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        return state_ ^= state_ << 17;
    }
    bool percent(uint64_t p) { return p && next() % 100 < p; }

private:
    uint64_t state_;
};

enum Response : uint8_t { kOkay = 0, kSlverr = 2, kDecerr = 3 };

// What read and write ports share: timing mode, error injection and the record of protocol violations.
class Port {
public:
    Port(const Config& config, Memory& memory, Channel& channel, uint64_t base, uint64_t salt)
        : memory_(memory), channel_(channel), base_(base), hbm_(config.mode == "hbm"), random_mode_(config.mode == "random"),
          latency_(config.at("latency_cycles")), stall_(config.at("stall_percent")), error_address_(config.at("error_address")),
          error_response_(config.at("error_response")), max_bursts_(config.at("max_bursts")),
          random_(config.at("seed") * 1000003 + salt) {
        if (!hbm_ && !random_mode_ && config.mode != "fixed")
            throw std::runtime_error("memory mode must be hbm, fixed or random, not " + config.mode);
    }
    std::vector<std::string> violations;

protected:
    void require(bool rule, const char* what, uint64_t cycle) {
        if (!rule) violations.push_back(std::string(what) + " in cycle " + std::to_string(cycle));
    }
    void check_burst(uint64_t cycle, uint64_t address, uint32_t beats, uint32_t bytes, uint32_t burst) {
        require(address % bytes == 0, "an address is not aligned to its beat", cycle);
        require(address / 4096 == (address + uint64_t(beats) * bytes - 1) / 4096, "a burst crosses 4 KB", cycle);
        require(burst == 1, "a burst is not INCR", cycle);
    }
    Response response(uint64_t address, uint64_t bytes) const {
        if (address < base_ || address - base_ + bytes > memory_.size()) return kDecerr;
        int64_t bad = error_address_;
        return bad >= 0 && uint64_t(bad) >= address && uint64_t(bad) < address + bytes ? Response(error_response_) : kOkay;
    }
    uint64_t simple_latency() { return random_mode_ ? 1 + random_.next() % latency_ : latency_; }
    bool hbm() const { return hbm_; }
    bool random() const { return random_mode_; }
    bool stalls() { return random_mode_ && random_.percent(stall_); }

    Memory& memory_;
    Channel& channel_;
    uint64_t base_;

private:
    bool hbm_, random_mode_;
    uint64_t latency_, stall_;
    int64_t error_address_;
    uint8_t error_response_;

protected:
    size_t max_bursts_;
    Random random_;
};

class ReadPort : public Port {
public:
    using Port::Port;

    // Outputs for the next cycle.
    bool arready = false, rvalid = false, rlast = false;
    uint8_t rresp = 0;
    uint32_t rid = 0;
    const uint8_t* rdata = kZeros;

    void clock(uint64_t cycle, bool arvalid, uint64_t araddr, uint32_t arlen, uint32_t arsize, uint32_t arburst,
               uint32_t arid, bool rready) {
        if (was_waiting_) require(arvalid && araddr == last_addr_ && arlen == last_len_, "an address changed before its transfer", cycle);
        was_waiting_ = arvalid && !arready;
        last_addr_ = araddr, last_len_ = arlen;
        if (rvalid && rready) pop(cycle);
        if (arvalid && arready) push(cycle, araddr, arlen + 1, 1u << arsize, arburst, arid);
        arready = bursts_.size() < max_bursts_ && !stalls();
        if (!rvalid || rready) offer(cycle + 1);
    }
    void reset() {
        bursts_.clear(), ready_.clear();
        arready = rvalid = was_waiting_ = false;
    }
    bool idle() const { return bursts_.empty(); }

private:
    struct Burst {
        uint64_t address, accepted, free_at;
        uint32_t beats, bytes, id, sent;
        Response resp;
    };

    void push(uint64_t cycle, uint64_t address, uint32_t beats, uint32_t bytes, uint32_t burst, uint32_t id) {
        check_burst(cycle, address, beats, bytes, burst);
        Burst b{address, cycle, cycle + 1, beats, bytes, id, 0, response(address, uint64_t(beats) * bytes)};
        const int64_t arrival = channel_.arrival(cycle);
        if (!hbm()) b.free_at = cycle + simple_latency();
        else
            for (uint32_t n = 0; n < beats; n++)
                ready_.push_back(b.resp == kDecerr ? 0 : channel_.served(arrival, address - base_ + uint64_t(n) * bytes, bytes, false));
        channel_.stats.read_bursts++;
        bursts_.push_back(b);
    }
    void offer(uint64_t cycle) {
        rvalid = false;
        if (bursts_.empty()) return;
        Burst& b = bursts_.front();
        if (cycle < b.free_at || (hbm() && int64_t(cycle) * Channel::kPerCycle < ready_.front()) || stalls()) return;
        rvalid = true;
        rid = b.id;
        rresp = b.resp;
        rlast = b.sent + 1 == b.beats;
        rdata = b.resp == kOkay ? memory_.at(b.address - base_ + uint64_t(b.sent) * b.bytes) : kZeros;
        if (!b.sent) {
            uint64_t taken = cycle - b.accepted;
            channel_.stats.latency_cycles += taken;
            channel_.stats.latency_max = std::max(channel_.stats.latency_max, taken);
        }
    }
    void pop(uint64_t) {
        Burst& b = bursts_.front();
        channel_.stats.bytes_read += b.bytes;
        if (hbm()) ready_.pop_front();
        if (++b.sent == b.beats) bursts_.pop_front();
    }

    inline static const uint8_t kZeros[64] = {};
    std::deque<Burst> bursts_;
    std::deque<int64_t> ready_;  // of each beat to come in hbm mode, as Channel::served counts
    bool was_waiting_ = false;
    uint64_t last_addr_ = 0;
    uint32_t last_len_ = 0;
};

// Data reaches the memory only when its response is given, so that a reader that does not wait for it sees old bytes.
class WritePort : public Port {
public:
    using Port::Port;

    bool awready = false, wready = false, bvalid = false;
    uint8_t bresp = 0;
    uint32_t bid = 0;

    void clock(uint64_t cycle, bool awvalid, uint64_t awaddr, uint32_t awlen, uint32_t awsize, uint32_t awburst,
               uint32_t awid, bool wvalid, const uint8_t* wdata, uint64_t wstrb, bool wlast, bool bready) {
        if (aw_waiting_) require(awvalid && awaddr == last_addr_, "a write address changed before its transfer", cycle);
        if (w_waiting_) require(wvalid, "write data was withdrawn before its transfer", cycle);
        aw_waiting_ = awvalid && !awready;
        w_waiting_ = wvalid && !wready;
        last_addr_ = awaddr;
        if (bvalid && bready) {
            bursts_.pop_front();
            received_--;
            bvalid = false;
        }
        if (awvalid && awready) {
            check_burst(cycle, awaddr, awlen + 1, 1u << awsize, awburst);
            bursts_.push_back({awaddr, awlen + 1, 1u << awsize, awid, response(awaddr, uint64_t(awlen + 1) << awsize)});
        }
        if (wvalid && wready) {
            beats_.push_back({std::vector<uint8_t>(wdata, wdata + 64), wstrb});
            lasts_.push_back(wlast);
        }
        gather(cycle);
        awready = bursts_.size() < max_bursts_ && !stalls();
        wready = beats_.size() < 2 * 256 && !stalls();
        if (!bvalid) answer(cycle + 1);
        settled_ = !random() && idle() && awready && wready && !bvalid && !aw_waiting_ && !w_waiting_;
    }
    void reset() {
        bursts_.clear(), beats_.clear(), lasts_.clear();
        received_ = 0;
        awready = wready = bvalid = aw_waiting_ = w_waiting_ = settled_ = false;
    }
    bool idle() const { return bursts_.empty() && beats_.empty(); }
    // Ready for a burst with none inside: a cycle that begins none changes nothing, unless it draws a stall.
    bool settled() const { return settled_; }

private:
    struct Beat {
        std::vector<uint8_t> data;
        uint64_t strobes;
    };
    struct Burst {
        uint64_t address;
        uint32_t beats, bytes, id;
        Response resp;
        uint64_t ready = 0;
        std::vector<Beat> data = {};
    };

    void gather(uint64_t cycle) {
        while (received_ < bursts_.size() && beats_.size() >= bursts_[received_].beats) {
            Burst& b = bursts_[received_++];
            for (uint32_t n = 0; n < b.beats; n++) {
                require(lasts_.front() == (n + 1 == b.beats), "wlast is early or late", cycle);
                b.data.push_back(std::move(beats_.front()));
                beats_.pop_front(), lasts_.pop_front();
            }
            bool timed = hbm() && b.resp != kDecerr;
            b.ready = timed ? channel_.serve(cycle, b.address - base_, b.beats * b.bytes, true) : cycle + simple_latency();
            channel_.stats.write_bursts++;
        }
    }
    void answer(uint64_t cycle) {
        if (!received_ || cycle < bursts_.front().ready || stalls()) return;
        Burst& b = bursts_.front();
        if (b.resp == kOkay) commit(b);
        bvalid = true;
        bresp = b.resp;
        bid = b.id;
    }
    void commit(const Burst& b) {
        for (uint32_t n = 0; n < b.beats; n++) {
            uint8_t* row = memory_.at(b.address - base_ + uint64_t(n) * b.bytes);
            for (uint32_t byte = 0; byte < b.bytes; byte++)
                if (b.data[n].strobes >> byte & 1) row[byte] = b.data[n].data[byte], channel_.stats.bytes_written++;
        }
    }

    std::deque<Burst> bursts_;
    std::deque<Beat> beats_;
    std::deque<bool> lasts_;
    size_t received_ = 0;
    bool aw_waiting_ = false, w_waiting_ = false, settled_ = false;
    uint64_t last_addr_ = 0;
};

}  // namespace kvstrata

// --- Verilated designs: connect the pins whose names start with PREFIX (Verilator writes "__" as "___05F") ---
#define KV_DRIVE_READ(top, PREFIX, port)                                   \
    do {                                                                   \
        (top).PREFIX##___05Farready = (port).arready;                          \
        (top).PREFIX##___05Frvalid = (port).rvalid;                            \
        (top).PREFIX##___05Frlast = (port).rlast;                              \
        (top).PREFIX##___05Frresp = (port).rresp;                              \
        (top).PREFIX##___05Frid = (port).rid;                                  \
        if ((port).rvalid) std::memcpy(&(top).PREFIX##___05Frdata, (port).rdata, sizeof((top).PREFIX##___05Frdata)); \
    } while (0)
#define KV_CLOCK_READ(top, PREFIX, port, cycle)                                                                   \
    (port).clock(cycle, (top).PREFIX##___05Farvalid, (top).PREFIX##___05Faraddr, (top).PREFIX##___05Farlen, (top).PREFIX##___05Farsize, \
                 (top).PREFIX##___05Farburst, (top).PREFIX##___05Farid, (top).PREFIX##___05Frready)
#define KV_DRIVE_WRITE(top, PREFIX, port)           \
    do {                                            \
        (top).PREFIX##___05Fawready = (port).awready;   \
        (top).PREFIX##___05Fwready = (port).wready;     \
        (top).PREFIX##___05Fbvalid = (port).bvalid;     \
        (top).PREFIX##___05Fbresp = (port).bresp;       \
        (top).PREFIX##___05Fbid = (port).bid;           \
    } while (0)
#define KV_CLOCK_WRITE(top, PREFIX, port, cycle)                                                                  \
    do {                                                                                                          \
        if ((port).settled() && !(top).PREFIX##___05Fawvalid && !(top).PREFIX##___05Fwvalid) break;                        \
        uint8_t kv_beat[64] = {};                                                                                 \
        if ((top).PREFIX##___05Fwvalid) std::memcpy(kv_beat, &(top).PREFIX##___05Fwdata, sizeof((top).PREFIX##___05Fwdata)); \
        (port).clock(cycle, (top).PREFIX##___05Fawvalid, (top).PREFIX##___05Fawaddr, (top).PREFIX##___05Fawlen,               \
                     (top).PREFIX##___05Fawsize, (top).PREFIX##___05Fawburst, (top).PREFIX##___05Fawid, (top).PREFIX##___05Fwvalid, \
                     kv_beat, (top).PREFIX##___05Fwstrb, (top).PREFIX##___05Fwlast, (top).PREFIX##___05Fbready);              \
    } while (0)
