"""The page's style sheet: one column, light or dark as the reader's system is."""

from instructax.report.drawing import COLOURS

_POLICIES = "".join(
    f'.card[data-policy="{policy}"] {{ border-top-color: {colour}; }}\n'
    for policy, colour in COLOURS.items()
)
STYLE = (
    """
:root { --text: #1c1e21; --back: #fff; --quiet: #5c6370; --line: #d8dce2; --panel: #f5f6f8; --link: #0b62b8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --back: #16181c; --quiet: #a0a7b3; --line: #363b44; --panel: #1f2329; --link: #7bb8f5; }
}
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.2rem; }
nav { display: flex; flex-wrap: wrap; gap: 1.2rem; padding-bottom: .8rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p { max-width: 60rem; }
.quiet, figcaption, .use, .numbers, #count { color: var(--quiet); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
details { padding: .45rem 0; border-bottom: 1px solid var(--line); }
summary { cursor: pointer; }
.badge { display: inline-block; min-width: 5.6rem; text-align: center; border-radius: .3rem; padding: 0 .4rem;
  font-size: .82rem; color: #fff; background: #6b7280; }
.badge.seen { background: #1a7f37; } .badge.not-seen { background: #b3261e; } .badge.undecided { background: #8a6100; }
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; padding: .4rem;
  border: 1px solid var(--line); }
.filters { display: flex; flex-wrap: wrap; gap: .8rem; align-items: center; margin: .6rem 0; }
select, input, button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: .3rem; padding: .15rem .4rem; }
.prompt { border-top: 1px solid var(--line); padding: .8rem 0; }
.prompt p { margin: .2rem 0; }
.asked { font-weight: 600; white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .7rem; margin-top: .5rem; }
.card { background: var(--panel); border-radius: .3rem; border-top: 4px solid #6b7280; padding: .4rem .7rem; }
.card h4 { margin: 0; font-size: .88rem; }
.response { white-space: pre-wrap; overflow-wrap: anywhere; }
.response span { border-radius: .15rem; }
.fault { display: inline-block; font-size: .76rem; border: 1px solid #c2574f; border-radius: .3rem; padding: 0 .3rem;
  margin: 0 .3rem .2rem 0; }
"""
    + _POLICIES
)
