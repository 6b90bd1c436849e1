"""Word lists of the problem generators.

Every list is short on purpose: a model of some ten million parameters sees each word many thousand times, and
the tokenizer makes each one a single token.
"""

NAMES = tuple(
    (
        "Tom Ann Leo Mia Sam Eva Ben Zoe Max Ida Tim Amy Jon Kim Roy Liz Dan Joy Ned Ivy Gus Fay Hal Una Ray "
        "Sue Ken Meg Abe Pam Lou Viv"
    ).split()
)
ITEMS = tuple(
    (
        "apples pens books coins cards shells stones beads cups plums keys toys hats maps nuts rings boxes "
        "balls seeds eggs"
    ).split()
)
CITIES = tuple("Paris Rome Oslo Lima Cairo Delhi Tokyo Quito Bern Dublin Athens Prague".split())
COLORS = tuple("red blue green black white pink gray gold brown orange".split())
PETS = tuple("cat dog fish bird horse mouse rabbit snake goat duck".split())
JOBS = tuple("cook nurse pilot baker farmer judge clerk singer doctor miner".split())
FRUITS = tuple("apple pear plum fig grape lemon melon peach cherry mango".split())
TEAMS = tuple("north south east west river forest desert island".split())
VERBS = tuple("make get find build apply compute run handle solve check process create".split())
NOUNS = tuple("value result data total output answer steps score task part entry report".split())
