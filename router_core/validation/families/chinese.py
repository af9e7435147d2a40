"""Several families in Chinese: sums, stories, dates, facts, reading, labels and notes, graded like the English ones."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.open_tables import facts
from router_core.validation.graders import ContainsGrader, Grader, NumericGrader, SequenceGrader, Terms, WritingGrader

_NAMES = ("小明", "小红", "李华", "王芳", "张伟", "刘洋", "陈静", "赵磊")
_WEEKDAYS = "一二三四五六日"

Task = tuple[str, Grader, str]


def _number(text: str, value: float) -> Task:
    return text, NumericGrader(value, 0.005), f"答案是 {value:g}。"


def _easy_sum(rng: Random) -> Task:
    a, b = rng.randint(12, 80), rng.randint(3, 19)
    return rng.choice(
        [
            _number(f"{a} 加 {b} 等于多少?", a + b),
            _number(f"{rng.choice(_NAMES)}有{a}个苹果,又买了{b}个,现在一共有几个?只回答数字。", a + b),
            _number(f"请计算:{a} × {b % 9 + 2} = ?", a * (b % 9 + 2)),
        ]
    )


def _middling_sum(rng: Random) -> Task:
    price, count, paid = rng.randint(6, 18), rng.randint(3, 7), 200
    speed, hours = rng.randint(40, 95), rng.randint(3, 8)
    return rng.choice(
        [
            _number(
                f"一本笔记本{price}元,{rng.choice(_NAMES)}买了{count}本,付了{paid}元,应找回多少元?",
                paid - price * count,
            ),
            _number(
                f"汽车每小时行驶{speed}千米,{hours}小时后又走了{price}千米,一共走了多少千米?", speed * hours + price
            ),
            _number(f"{speed}千米等于多少米?请直接给出结果。", speed * 1000),
        ]
    )


def _hard_sum(rng: Random) -> Task:
    chickens, rabbits = rng.randint(11, 40), rng.randint(11, 40)
    price, off = rng.randrange(240, 900, 20), rng.choice([7, 8, 9])
    return rng.choice(
        [
            _number(
                f"鸡兔同笼,共有{chickens + rabbits}个头,{2 * chickens + 4 * rabbits}只脚。请问兔子有多少只?", rabbits
            ),
            _number(f"一件大衣原价{price}元,先打{off}折,再减20元,最后要付多少元?", price * off / 10 - 20),
            _number(
                f"甲独自完成一项工程需要{rabbits}天,乙的效率是甲的两倍。乙独自完成需要几天?保留一位小数。", rabbits / 2
            ),
        ]
    )


def _days(rng: Random) -> Task:
    start = date(2024, rng.randint(1, 12), rng.randint(1, 28))
    days = rng.randint(10, 90)
    answer = _WEEKDAYS[(start + timedelta(days=days)).weekday()]
    text = (
        f"{start.month}月{start.day}日是星期{_WEEKDAYS[start.weekday()]}。再过{days}天是星期几?请按“星期几”的形式回答。"
    )
    if answer == "日":
        return text, ContainsGrader(Terms(any=("星期日", "星期天", "周日"), none=("不知道",))), "星期日"
    others = tuple(f"星期{day}" for day in _WEEKDAYS if day != answer)
    return text, ContainsGrader(Terms(any=(f"星期{answer}", f"周{answer}"), none=others)), f"星期{answer}"


def _older(rng: Random) -> Task:
    names = rng.sample(_NAMES, 3)
    text = f"{names[0]}比{names[1]}大,{names[2]}比{names[1]}小。请从大到小排列三个人,用逗号隔开。"
    return text, SequenceGrader(tuple(names)), ",".join(names)


def _feeling(rng: Random) -> Task:
    text, label = rng.choice(
        [
            ("这家餐厅的菜又凉又贵,再也不会来了。", "负面"),
            ("服务员非常热情,味道也很好,下次还来!", "正面"),
            ("等了一个小时才上菜,真是“高效”啊。", "负面"),
            ("本来没抱什么希望,结果惊喜不断。", "正面"),
        ]
    )
    shop = rng.choice(_NAMES)
    prompt = f"请判断下面评论的情感是正面还是负面,只回答“正面”或“负面”。\n{shop}的评论:{text}"
    other = "正面" if label == "负面" else "负面"
    return prompt, ContainsGrader(Terms(all=(label,), none=(other,))), f"{label}。"


def _note(rng: Random) -> Task:
    name, place, hour = rng.choice(_NAMES), rng.choice(["图书馆", "火车站", "公园", "咖啡馆"]), rng.randint(2, 8)
    prompt = (
        f"请替我给{name}写一条短信,约下午{hour}点在{place}见面,语气礼貌,不超过四十个字,要出现“{name}”和“{place}”。"
        "只写短信内容。"
    )
    grader = WritingGrader(Terms(all=(name, place)), words=(8, 46))
    return prompt, grader, f"{name}您好,下午{hour}点在{place}见面可以吗?谢谢!"


def _passage(rng: Random) -> Task:
    one, two = rng.sample(_NAMES, 2)
    place, year = rng.choice(["成都", "西安", "杭州", "昆明"]), rng.randint(1985, 2010)
    text = (
        f"{one}出生于{year}年,在{place}长大。大学毕业后,她和同学{two}一起开了一家书店。"
        f"三年后书店搬到了上海,{two}回老家当了老师,"
        f"{one}则留下来继续经营。\n\n根据这段话,谁当了老师?只回答名字。"
    )
    return text, WritingGrader(Terms(all=(two,), none=(one,)), words=(1, 20)), two


_TASKS: tuple[tuple[Callable[[Random], Task], ...], ...] = (
    (_easy_sum, _feeling),
    (_middling_sum, _older, _note, _passage),
    (_hard_sum, _days),
)


def _draw(rng: Random, level: int) -> Draft:
    text, grader, reference = rng.choice(_TASKS[level - 1])(rng)
    return Draft(text, grader, reference, level, LONG, "zh")


_FRAMES = ("{q}", "请回答:{q}", "{q}请用最短的话回答。", "你好,我想问一下,{q}")


SECTIONS = (
    Section("chinese", 18, by_levels(_draw)),
    Section("chinese_facts", 12, facts("chinese_facts", _FRAMES, language="zh"), family="chinese"),
)
