"""Make the demo data: chats to fine-tune on, and plain-text drills to pretrain the base on.

    python data/make.py                     writes, next to this file:
        chats.jsonl       training chats
        chats_val.jsonl   held-out chats: no word, list of words or pair of numbers is also in
                          the training chats of the same task
        pairs.jsonl       preference pairs: a right answer and a wrong one, on problems that are
                          not in the held-out chats either (experiments/dpo.py)
        drills.jsonl      a sample of the drills, the start of any larger file of them
    python data/make.py drills 34 PATH      writes 34 MB of drills, to pretrain the base

Chats and drills ask for the same skills (see TASKS) in different words: the base learns the
skills from the drills but never sees a chat, so fine-tuning has a format to teach and a score
that starts at zero. All output is ASCII and depends only on the seeds in this file.
"""
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
N_TRAIN, N_VAL, N_PAIRS = 9000, 300, 600

ENGLISH = """
able acorn actor after agent air alarm album alley amber anchor angle animal ankle answer apple april apron
arch arm army arrow art aunt autumn baby back badge bag baker ball banana band bank barn basket bath beach
bean bear beard bed bee bell belt bench berry bike bird black blanket blue board boat body bone book boot
bottle bowl box boy branch brave bread brick bridge bright broom brother brown brush bucket bus butter
button cabin cable cake camel camera camp candle cap car card carpet carrot castle cat cave chain chair
chalk cheese cherry chest child church circle city clay clean clock cloth cloud coach coast coat coffee coin
cold color comb cook copper corn cotton cousin cow crab crane cream crow crown cup curtain dance dark day
deep deer desk diamond dinner dish doctor dog doll door dragon dream dress drum duck dust eagle ear earth
east egg elbow engine evening eye face farm father feather fence fern field finger fire fish flag flame
floor flower flute fly fog folk food foot forest fork fox frame friend frog fruit garden gate ghost giant
gift girl glass globe glove goat gold goose grape grass green guest guitar hair hammer hand harbor hat hawk
heart hen hill honey hook horse hotel house ice iron island ivory jacket jar jelly jewel judge juice jungle
kettle key king kite kitten knee knife ladder lake lamb lamp land leaf lemon letter light lime lion lizard
lock log lunch maple map marble market mask meadow meal melon metal milk mill mint mirror money monkey month
moon morning moth mother mouse mouth mud music nail name needle nest net night north nose nut oak ocean
office olive onion orange otter oven owl paint palace palm panda paper park parrot path peach pear pearl pen
pencil pepper piano picnic pig pillow pilot pine pipe planet plant plate plum pocket poem pond pony potato
prince pumpkin puppy queen quiet quilt rabbit radio rain raven red ribbon rice ring river road robin rock
roof room root rope rose ruby ruler sail salt sand scarf school sea seed shadow shark sheep shelf shell ship
shirt shoe silk silver sister sky sled smoke snail snake snow soap sock soup south spider spoon spring
square star stone storm stove straw street sugar summer sun swan table tail tea teeth tent thumb tiger toast
tomato tower town toy train tree truck tulip turtle uncle valley velvet village violin wagon wall walnut
water wave west whale wheat wheel wind window wing winter wolf wood wool yard year yellow young zebra
""".split()


def syllable(rng):
    ends = ("", "l", "m", "n", "r", "s", "t", "", "")
    return rng.choice("bcdfghjklmnprstvwyz") + rng.choice("aeiou") + rng.choice(ends)


def word(rng):
    """An English word or, as often, a made-up one, so that no list of words can be memorized."""
    if rng.random() < 0.5:
        return rng.choice(ENGLISH)
    stem = "".join(syllable(rng) for _ in range(rng.choice((1, 2, 2))))
    return stem + rng.choice(("", "", "k", "x"))


def words(rng, low, high):
    return [word(rng) for _ in range(rng.randint(low, high))]


# A task draws a problem: the values that fill the {0} and {1} of a wording, and the answer.

def add(rng):
    # Small numbers come up more often than by chance: their sums are the steps of larger sums.
    a, b = (rng.randrange(rng.choice((10, 100, 100))) for _ in range(2))
    return (a, b), str(a + b)


def reverse(rng):
    w = word(rng)
    return (w,), w[::-1]


def upper(rng):
    w = word(rng)
    return (w,), w.upper()


def order(rng):
    ws = words(rng, 2, 4)
    return (" ".join(ws),), " ".join(reversed(ws))


def initials(rng):
    ws = words(rng, 2, 5)
    return (" ".join(ws),), "".join(w[0].upper() for w in ws)


def count(rng):
    ws = words(rng, 2, 7)
    return (" ".join(ws),), str(len(ws))


TASKS = {"add": add, "reverse": reverse, "upper": upper, "order": order, "initials": initials, "count": count}

# How often the drills practise a task: a tiny model learns to add long after all the rest.
DRILL_WEIGHTS = {"add": 52, "reverse": 14, "upper": 6, "order": 12, "initials": 6, "count": 10}

CHATS = {
    "add": ("What is {0} + {1}?", "How much is {0} plus {1}?", "Please add {0} and {1}.",
            "Can you work out {0} + {1} for me?", "What do I get if I add {0} to {1}?",
            "A box weighs {0} kg and a bag {1} kg. What do both weigh?"),
    "reverse": ("Spell the word {0} backwards.", 'What is "{0}" spelled backwards?',
                "Please reverse the letters of {0}.", 'Can you write "{0}" in reverse?',
                "How do you spell {0} backwards?"),
    "upper": ("Write {0} in capital letters.", 'Please put the word "{0}" in capitals.',
              "How does {0} look in all caps?", "Can you shout the word {0}?",
              'Change "{0}" to upper case.'),
    "order": ("Reverse the order of these words: {0}",
              "Please say these words starting with the last one: {0}",
              'Can you list "{0}" in the opposite order?', "Put the words {0} in reverse order."),
    "initials": ("What are the initials of {0}?", "Give me the first letters of these words: {0}",
                 'Please make an acronym from "{0}".', "Which initials does {0} have?"),
    "count": ('How many words are there in "{0}"?', "Count these words: {0}",
              "Can you tell me how many words this is: {0}", 'What is the number of words in "{0}"?'),
}

DRILLS = {
    "add": ("{0} + {1}", "{0} and {1} together", "sum of {0} and {1}", "{0}, then another {1}, in total",
            "{0} birds on the roof and {1} birds in the tree", "the number {0} with the number {1} on top",
            "a box of {0} nails, then a bag of {1} nails, all in all"),
    "reverse": ("{0} from back to front", "mirror word of {0}", "letters turned around, '{0}'",
                "{0} read right to left", "the letters of '{0}', last one first"),
    "upper": ("{0} in big letters", "large type, {0}", "'{0}' as on a sign", "loud {0}"),
    "order": ("last word first, {0}", "'{0}' with the words turned around", "{0} word by word from the end"),
    "initials": ("'{0}' for short", "first letter of each in {0}", "short name of {0}"),
    "count": ("length of the list {0}", "'{0}' has this many words", "words counted in {0}"),
}

# Title of a table of drills.
TITLES = {
    "add": ("sums", "two numbers together", "in total"),
    "reverse": ("mirror words", "from back to front", "letters turned around"),
    "upper": ("big letters", "large type", "loud"),
    "order": ("last word first", "words turned around"),
    "initials": ("for short", "first letter of each", "short names"),
    "count": ("length of the list", "words counted"),
}

# How a problem {q} and its answer {a} are joined.
TABLE_JOINS = ("{q} = {a}", "{q}: {a}", "{q} -> {a}", "{q} | {a}")
JOINS = ("{q} = {a}", "{q}: {a}", "{q} -> {a}", "{q} is {a}.", "{q}\n{a}", "Q: {q}\nA: {a}",
         "Problem: {q}.\nSolution: {a}", "pupil, {q}!\nresult\n{a}")


def draw_task(rng):
    return rng.choices(list(DRILL_WEIGHTS), list(DRILL_WEIGHTS.values()))[0]


def drill_table(rng):
    """Many problems of one task in few bytes: these teach the skill."""
    task, join = draw_task(rng), rng.choice(TABLE_JOINS)
    lines = [rng.choice(TITLES[task])]
    for _ in range(rng.randint(6, 14)):
        values, answer = TASKS[task](rng)
        lines.append(join.format(q=" + ".join(map(str, values)), a=answer))
    return "\n".join(lines)


def drill_sentences(rng):
    """A few problems of any task, each in its own words: these teach to tell what is asked."""
    lines = []
    for _ in range(rng.randint(4, 9)):
        task = draw_task(rng)
        values, answer = TASKS[task](rng)
        lines.append(rng.choice(JOINS).format(q=rng.choice(DRILLS[task]).format(*values), a=answer))
    return "\n".join(lines)


def write_drills(path, n_bytes):
    rng = random.Random(1)
    with open(path, "w", encoding="ascii", newline="\n") as f:
        while f.tell() < n_bytes:
            f.write(json.dumps({"text": rng.choice((drill_table, drill_sentences))(rng)}) + "\n")
    return path


def draw_problem(task, rng, seen):
    """A problem that is not in seen, the problems that are used up, and now is."""
    while True:
        values, answer = TASKS[task](rng)
        problem = (task, *sorted(values))  # sorted: 12 + 30 and 30 + 12 are one problem
        if problem not in seen:
            break
    seen.add(problem)
    return values, answer


def write_chats(path, n, rng, seen):
    """Write n chats, the tasks in turn."""
    with open(path, "w", encoding="ascii", newline="\n") as f:
        for i in range(n):
            task = list(TASKS)[i % len(TASKS)]
            values, answer = draw_problem(task, rng, seen)
            prompt = rng.choice(CHATS[task]).format(*values)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages, "task": task}) + "\n")
    return path


def write_pairs(path, n, rng, seen):
    """Write n preference pairs, the tasks in turn. The rejected answer is that of another problem."""
    with open(path, "w", encoding="ascii", newline="\n") as f:
        for i in range(n):
            task = list(TASKS)[i % len(TASKS)]
            values, chosen = draw_problem(task, rng, seen)
            rejected = chosen
            while rejected == chosen:
                _, rejected = TASKS[task](rng)
            prompt = rng.choice(CHATS[task]).format(*values)
            f.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def main(argv):
    if argv:
        if len(argv) != 3 or argv[0] != "drills" or not argv[1].isdigit():
            sys.exit("python data/make.py, or python data/make.py drills MEGABYTES PATH")
        path = Path(argv[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [write_drills(path, int(argv[1]) * 1e6)]
    else:
        rng, seen = random.Random(0), set()
        made = [write_chats(HERE / "chats_val.jsonl", N_VAL, rng, seen),
                write_chats(HERE / "chats.jsonl", N_TRAIN, rng, seen),
                write_pairs(HERE / "pairs.jsonl", N_PAIRS, rng, seen), write_drills(HERE / "drills.jsonl", 1e6)]
    for path in made:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
