"""Settings of every test process."""

import gc

# A simulation and a conversion make millions of objects that stay: looking for garbage among them after every 700 new
# ones takes a fifth of a test's time.
gc.set_threshold(200_000, 20, 100)
