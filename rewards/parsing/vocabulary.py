"""Tables of LaTeX commands, function names and words."""

from __future__ import annotations

_PLAIN_NAMES = (
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh coth ln log lg exp abs floor ceil cis"
    " gcd lcm det min max arg mod lim sqrt sup inf tr rank dim ker cbrt sgn erf"
)
FUNCTIONS: dict[str, str] = {name: name for name in _PLAIN_NAMES.split()} | {
    "cosec": "csc", "tg": "tan", "ctg": "cot", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "arctg": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc",
    "Sin": "sin", "Cos": "cos", "Tan": "tan", "arcsinh": "asinh", "arccosh": "acosh",
    "arctanh": "atanh", "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "Re": "re",
    "Im": "im", "deg": "degree", "sign": "sgn", "GCD": "gcd", "LCM": "lcm",
}  # fmt: skip
# Functions that a question asks to evaluate: not accepted in place of their value.
OPEN_FUNCTIONS = frozenset(
    {"gcd", "lcm", "det", "min", "max", "mod", "lim", "sup", "inf", "tr", "rank", "dim", "ker"}
    | {"degree", "arg", "re", "im", "erf"}
)
TEXT_COMMANDS = frozenset(
    {"text", "textbf", "textit", "textrm", "textnormal", "mbox", "hbox", "mathrm", "mathbf"}
    | {"mathit", "mathsf", "mathbb", "mathcal", "mathscr", "mathfrak", "operatorname", "boldsymbol"}
    | {"bm", "rm", "emph", "texttt", "textsf", "bold", "Bbb", "underline"}
)
IGNORED_COMMANDS = frozenset(
    {"quad", "qquad", "hline", "rm", "bf", "it", "cr", "centering", "small", "large", "Large"}
    | {"normalsize", "tiny", "newline", "hfill", "boxed", "fbox", "ensuremath", "overrightarrow"}
    | {"vec", "mathop", "limits", "textstyle", "protect"}
    | {"therefore", "because", "colon", "relax", "nonumber", "notag", "allowbreak"}
)
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi"
    " rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma"
    " Upsilon Phi Psi Omega ell hbar Pi aleph"
)
LETTER_COMMANDS: dict[str, str] = {name: "\\" + name for name in _GREEK.split()} | {
    "varphi": "\\phi", "varepsilon": "\\epsilon", "ldots": "\\ldots", "cdots": "\\ldots",
    "dots": "\\ldots", "dotsc": "\\ldots", "dotsb": "\\ldots", "R": "\\mathbb{R}",
    "N": "\\mathbb{N}", "Z": "\\mathbb{Z}", "Q": "\\mathbb{Q}", "ell": "l",
}  # fmt: skip
# Kind of token -> "text command command ...; text ..."; without a command, the text is one itself.
_COMMANDS = {
    "cmd": """frac frac dfrac tfrac cfrac nicefrac sfrac; binom binom dbinom tbinom; sqrt;
        integral int iint oint; sum; product prod; emptyset emptyset varnothing; dot; ddot;
        overline overline bar; hat hat widehat; tilde tilde widetilde; stackrel stackrel overset;
        angle angle measuredangle triangle""",
    "op": r"""+- pm; -+ mp; * cdot times ast star; / div; <= le leq leqslant leqq; < lt; > gt;
        >= ge geq geqslant geqq; != ne neq; ~= approx simeq sim doteq; === equiv cong; in; notin;
        cup cup bigcup; cap cap bigcap; setminus setminus backslash; | mid vert Vert; |( lvert;
        |) rvert; to to rightarrow Rightarrow implies longrightarrow; circ; degree; perp; parallel;
        iff iff Leftrightarrow leftrightarrow; mod bmod pmod mod; ' prime; choose; over;
        subset subset subseteq; £ pounds; € euro; currency textdollar; % percent""",
    "open": r"\{ lbrace; [ lbrack; ( lparen; < langle; lfloor; lceil",
    "close": r"\} rbrace; ] rbrack; ) rparen; > rangle; rfloor; rceil",
    "word": "and land wedge; or lor vee; forall; exists",
    "const": "pi; inf infty infin",
    "sym": r"\partial partial; \nabla nabla",
}
COMMANDS: dict[str, tuple[str, str]] = {
    **{name: ("func", value) for name, value in FUNCTIONS.items()},
    **{
        name: (kind, entry.split()[0])
        for kind, table in _COMMANDS.items()
        for entry in table.split(";")
        for name in entry.split()[1:] or entry.split()
    },
}

CURRENCIES = {"currency": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}
SEPARATOR_WORDS = frozenset({"and", "or"})
PERCENT_WORDS = frozenset({"percent", "percentage", "pct", "percents"})
QUALIFIER_WORDS = frozenset(
    {"where", "for", "if", "when", "with", "such", "forall", "provided", "given", "as", "because"}
    | {"since", "exists", "whenever", "from", "by"}
)
NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80}
SCALE_WORDS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
NUMBER_WORDS |= {"ninety": 90, "hundred": 100, "thousand": 1000, "none": 0}
# Short words that would otherwise be products of letters.
WORDS = (
    frozenset(
        "and or for if is are the of to in on at by as it no yes not odd even all any none only"
        " one two six ten day days year years inch inches feet foot hour hours min sec mins secs"
        " mph pct unit units cents cent men man boy boys girl girls mod th st nd rd am pm"
        " some true false from then than with when where such that let so be has have up was were"
        " more less over half".split()
    )
    | SEPARATOR_WORDS
    | PERCENT_WORDS
    | QUALIFIER_WORDS
    | frozenset(NUMBER_WORDS)
)

# Words before a value that do not change it.
FILLER_WORDS = frozenset(
    "only exactly about approximately roughly around just the a an is are be equals answer"
    " answers value values solution solutions of set final total numbers number integers"
    " integer real both there exist exists we get have so thus hence therefore x-values"
    " units per each in on to it its that which possible different result exact simply"
    " precisely by was were will would".split()
)
