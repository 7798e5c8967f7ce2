"""Special-function unit: everything a decoder does between two matrix products, exact to the bit.

- `lanes`: the two-multiplier lane array through which every element of every vector operation passes
- `scalars`: what exists once per vector (scales, reciprocals, roots), sequential and shared
- `softmax`: the online softmax beside the attention products
- `scaling`: accumulators to the vector format
- `vector_unit`: buffer, sequencer and lane array together, executing vector operations
- `timing`: closed-form cycles of all of them
"""
