"""One protocol, several devices: golden (functional), rtl (Verilated), timing (closed forms)."""
