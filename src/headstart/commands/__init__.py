"""The commands, in the order that `headstart --help` lists them; each is one module."""

from headstart.arguments import Command
from headstart.commands.compare import COMPARE
from headstart.commands.inspect import INSPECT
from headstart.commands.plan import PLAN
from headstart.commands.replay import REPLAY
from headstart.commands.sample import SAMPLE
from headstart.commands.slide import SLIDE

COMMANDS: tuple[Command, ...] = (COMPARE, SAMPLE, SLIDE, PLAN, INSPECT, REPLAY)
