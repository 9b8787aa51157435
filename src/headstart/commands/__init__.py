"""The commands, in the order that `headstart --help` lists them; each is one module."""

from headstart.arguments import Command
from headstart.commands.compare import COMPARE
from headstart.commands.evaluate import EVALUATE
from headstart.commands.inspect import INSPECT
from headstart.commands.plan import PLAN
from headstart.commands.replay import REPLAY
from headstart.commands.sample import SAMPLE
from headstart.commands.sweep import SWEEP

COMMANDS: tuple[Command, ...] = (COMPARE, SAMPLE, PLAN, INSPECT, REPLAY, SWEEP, EVALUATE)
