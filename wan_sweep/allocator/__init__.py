"""The rules of PyTorch's caching allocator for CUDA, as a model that needs neither torch nor a GPU.

`Layout` is the state: segments got from the driver, cut into blocks that are free or taken. It is driven by addresses,
so it replays a recording exactly. `Allocator` adds the choice of addresses, so it predicts. One device.

1. A request is rounded up to 512 bytes, or to a fraction of a power of two with `roundup_power2_divisions`.
2. Up to 1 MiB it is served from the small pool, else from the large one; each stream has its own two. The smallest
   free block that fits is taken, of equal ones that with the lowest address.
3. If none fits, a segment comes from the driver: 2 MiB for the small pool, 20 MiB for requests below 10 MiB, else the
   request rounded up to 2 MiB.
4. The block is split if at least 512 bytes remain, in the large pool only if more than 1 MiB remains and the request
   is below `max_split_size`. A tail that is not split off counts as allocated.
5. With `max_split_size`, blocks of that size or more never serve smaller requests, and a request of that size accepts
   a block that is less than 20 MiB larger.
6. A freed block merges with the free blocks beside it in its segment. Segments go back to the driver only when the
   cache is emptied or the driver has no more.
7. When the driver has no more: with `max_split_size`, just enough free large blocks go back; if that does not help,
   all segments without a live block do; then the driver is asked once more, and the next failure is an OOM.
8. With `expandable_segments`, each pool of a stream is one range of addresses, of 9/8 of the device's memory, into
   which pages are mapped: 2 MiB for the small pool, 20 MiB for the large one, lowest address first. Best fit looks at
   the size that a block could grow to. Emptying the cache unmaps whole free pages. Every tail of 512 bytes is split.
9. A block that another stream still uses when it is freed stays active, and is not free, until that stream is done.
10. requested counts what was asked for and active the blocks, both until the free is completed; allocated counts the
    blocks until the free is requested; reserved counts segments. inactive_split is what is free in segments that
    cannot go back because a block in them is not; torch does not keep it for expandable segments.

Not modelled: garbage_collection_threshold, private pools of CUDA graphs (a replay takes them as they come), and the
cudaMallocAsync backend.
"""

from wan_sweep.allocator.configured import settings_of
from wan_sweep.allocator.layout import Block, Layout, LayoutError, Segment
from wan_sweep.allocator.model import Allocator, OutOfMemoryError
from wan_sweep.allocator.rules import Settings

__all__ = ["Allocator", "Block", "Layout", "LayoutError", "OutOfMemoryError", "Segment", "Settings", "settings_of"]
