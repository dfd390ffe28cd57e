# SPDX-License-Identifier: Apache-2.0
"""check(model, ...): whether a program's own pass reads every shared weight only when it is there, and writes none.

checking puts the passes in order. Each other module does one thing for it: put back what a pass changes, take digests
of what it computes, look at what its operators read, make sentences of what the ranks found. They may know a sharded
model by its handle; nothing outside this package knows them, but for what layershard.torch offers of checking.
"""
