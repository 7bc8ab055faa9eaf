"""torchrun itself, but that the collector of cycles leaves alone what it imports: half a second of every launch."""

from stabilitylab.command_line import imports_uncollected

with imports_uncollected():
    from torch.distributed.run import main

if __name__ == "__main__":
    main()
