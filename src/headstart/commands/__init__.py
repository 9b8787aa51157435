"""The commands, in the order that `headstart --help` lists them; each is one module."""

from headstart.arguments import Command
from headstart.commands.compare import COMPARE
from headstart.commands.convert import CONVERT
from headstart.commands.inspect import INSPECT
from headstart.commands.plan import PLAN
from headstart.commands.replay import REPLAY
from headstart.commands.sample import SAMPLE
from headstart.commands.sweep import SWEEP
from headstart.commands.trace import TRACE
from headstart.commands.transfer import TRANSFER

COMMANDS: tuple[Command, ...] = (
    *(COMPARE, SAMPLE, TRACE, SWEEP),
    *(PLAN, INSPECT, CONVERT, TRANSFER, REPLAY),
)
