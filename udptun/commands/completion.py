"""`udptun completion bash|zsh|fish`: a script for the shell, made of what --help says."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from udptun.commands.help_pages import Option, Page, Pages, read_pages
from udptun.core.errors import UsageError

USAGE = """\
usage: udptun completion bash|zsh|fish

Print a script that completes commands, flags and files in that shell.  To have it in every shell:

    udptun completion bash > /usr/share/bash-completion/completions/udptun
    udptun completion zsh > /usr/share/zsh/vendor-completions/_udptun
    udptun completion fish > /usr/share/fish/vendor_completions.d/udptun.fish
"""


def run(argv: Sequence[str], help_of: Callable[[tuple[str, ...]], str]) -> int:
    """Print the script; `help_of` as in `read_pages`.  Raises UsageError."""
    if {"-h", "--help", "-help"}.intersection(argv):
        print(USAGE, end="")
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UsageError(f"completion: which shell? one of {', '.join(SHELLS)}")
    print(script(argv[0], read_pages(help_of)), end="")
    return 0


def script(shell: str, pages: Pages) -> str:
    """That of one of `SHELLS`."""
    return SHELLS[shell](pages)


_BASH = """\
# Completion of udptun and flanneld.  Made by `udptun completion bash`.
_udptun() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} page=${COMP_WORDS[1]-}
    local actions= flags= files= dirs=
    # bash takes --flag=value for three words.
    if [[ $cur == = ]]; then
        cur=
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if [[ ${COMP_WORDS[0]##*/} == flanneld ]]; then
        page=daemon
    elif [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W '@COMMANDS@' -- "$cur"))
        return
    fi
    case "$page ${COMP_WORDS[2]-}" in
@PAGES@
    esac
    if [[ " $dirs " == *" $prev "* ]]; then
        COMPREPLY=($(compgen -d -- "$cur"))
    elif [[ " $files " == *" $prev "* ]]; then
        COMPREPLY=($(compgen -f -- "$cur"))
    elif [[ $prev == --iface ]]; then
        COMPREPLY=($(compgen -W "$(cd /sys/class/net 2>/dev/null && echo *)" -- "$cur"))
    elif [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
    elif [[ $COMP_CWORD -eq 2 ]]; then
        COMPREPLY=($(compgen -W "$actions" -- "$cur"))
    fi
}
complete -o default -F _udptun udptun flanneld
"""


def _bash(pages: Pages) -> str:
    cases = []
    for pattern, page in _cases(pages):
        named = {
            "actions": list(page.actions),
            "flags": _names(page, lambda it: True),
            "files": _names(page, lambda it: it.takes_file),
            "dirs": _names(page, lambda it: it.takes_directory),
        }
        values = [f"{name}={shlex.quote(' '.join(them))}" for name, them in named.items() if them]
        cases.append(f"        {pattern}) {'; '.join(values) or ':'} ;;")
    return _BASH.replace("@COMMANDS@", " ".join(pages[()].actions)).replace("@PAGES@", "\n".join(cases))


def _cases(pages: Pages) -> Iterator[tuple[str, Page]]:
    """A shell's pattern for the command and the word behind it, and their page."""
    # An action's page stands before its command's, whose pattern takes all that is left.
    for words, page in sorted(pages.items(), key=lambda it: -len(it[0])):
        if words:
            yield (shlex.quote(" ".join(words)) if len(words) == 2 else f"{shlex.quote(f'{words[0]} ')}*"), page


def _names(page: Page, takes: Callable[[Option], bool]) -> list[str]:
    return [name for it in page.options if takes(it) for name in it.names]


_ZSH = """\
#compdef udptun flanneld
# Completion of udptun and flanneld.  Made by `udptun completion zsh`.
_udptun() {
    local page=$words[2] previous=$words[CURRENT-1]
    local -a commands actions flags files dirs
    commands=(@COMMANDS@)
    if [[ ${words[1]:t} == flanneld ]]; then
        page=daemon
    elif (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case "$page $words[3]" in
@PAGES@
    esac
    if [[ $words[CURRENT] == --*=* ]]; then
        previous=${words[CURRENT]%%=*}
        compset -P '*='
    fi
    if (( $dirs[(Ie)$previous] )); then
        _files -/
    elif (( $files[(Ie)$previous] )); then
        _files
    elif [[ $previous == --iface ]]; then
        _net_interfaces
    elif (( $#actions && CURRENT == 3 )); then
        _describe action actions
    elif [[ $words[CURRENT] == -* ]]; then
        _describe -o flag flags
    else
        _files
    fi
}
# zsh reads this file as the body of the function when it lies in fpath; others source it.
if [[ $funcstack[1] == _udptun ]]; then
    _udptun "$@"
else
    compdef _udptun udptun flanneld
fi
"""


def _zsh(pages: Pages) -> str:
    cases = []
    for pattern, page in _cases(pages):
        named = {
            "actions": _described(page.actions),
            "flags": _described({name: it.help for it in page.options for name in it.names}),
            "files": " ".join(_names(page, lambda it: it.takes_file)),
            "dirs": " ".join(_names(page, lambda it: it.takes_directory)),
        }
        values = [f"{name}=({them})" for name, them in named.items() if them]
        cases.append(f"        {pattern}) {'; '.join(values) or ':'} ;;")
    return _ZSH.replace("@COMMANDS@", _described(pages[()].actions)).replace("@PAGES@", "\n".join(cases))


def _described(helps: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(f"{name}:{help}" if help else name) for name, help in helps.items())


_FISH = """\
# Completion of udptun and flanneld.  Made by `udptun completion fish`.
function __udptun_at -d 'Whether the words behind the program begin with these; with --last: and are no more'
    set -l words (commandline -opc)[2..-1]
    if test "$argv[1]" = --last
        set -e argv[1]
        test (count $words) -eq (count $argv); or return 1
    end
    test (count $words) -ge (count $argv); or return 1
    for i in (seq (count $argv))
        test "$words[$i]" = "$argv[$i]"; or return 1
    end
end
"""


def _fish(pages: Pages) -> str:
    lines = [_FISH]
    for words, page in pages.items():
        here = " ".join(words)
        is_next = _fish_text(f"__udptun_at --last {here}".strip())
        lines += [
            f"complete -c udptun -f -n {is_next} -a {name} -d {_fish_text(help)}" for name, help in page.actions.items()
        ]
        # The flags of a command that has actions belong to those.
        last = "--last " * bool(page.actions)
        lines += [
            f"complete -c udptun -n {_fish_text(f'__udptun_at {last}{here}')} {_fish_option(it)}" for it in page.options
        ]
    lines += [f"complete -c flanneld {_fish_option(it)}" for it in pages[("daemon",)].options]
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    names = " ".join(f"-{'l' if it.startswith('--') else 's'} {it.lstrip('-')}" for it in option.names)
    value = " -r" if option.takes_file else " -x -a '(__fish_complete_directories)'" if option.takes_directory else ""
    value = value or (" -x" if option.value else "")
    return f"{names}{value} -d {_fish_text(option.help)}"


def _fish_text(text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{quoted}'"


SHELLS: Mapping[str, Callable[[Pages], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""What makes the script of each shell."""
