"""Short tasks in French, German, Portuguese, Italian, Japanese, Russian and Korean; in Arabic, Hindi and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from random import Random

from router_core.validation.families.helpers import LEVELS, LONG, Draft, Drafts, Section
from router_core.validation.families.open_tables import fact_draft
from router_core.validation.families.tables import Fact, parse_facts
from router_core.validation.graders import NumericGrader


@dataclass(frozen=True)
class Tongue:
    """One language: templates of sums at three levels, with {a}, {b} and {c}, and a table of facts."""

    sums: tuple[str, str, str]
    facts: tuple[Fact, ...]


def _facts(lines: str) -> tuple[Fact, ...]:
    return parse_facts(lines.strip().splitlines())


TONGUES: Mapping[str, Tongue] = {
    "fr": Tongue(
        (
            "Combien font {a} plus {b} ?",
            "Un cahier coûte {b} euros. Combien coûtent {a} cahiers ? Répondez par un nombre.",
            (
                "Un train roule à {a} km/h pendant {b} heures, puis parcourt encore {c} kilomètres. Quelle distance"
                " totale a-t-il parcourue, en kilomètres ?"
            ),
        ),
        _facts("""
1 | Quelle est la capitale de l'Italie ? | Rome
2 | Qui a écrit Les Misérables ? | Hugo
2 | Quel est le contraire de « ancien » ? Un seul mot. | nouveau / moderne / récent / neuf
3 | En quelle année la Révolution française a-t-elle commencé ? | 1789
3 | Quel est le participe passé du verbe « vivre » ? | vécu
"""),
    ),
    "de": Tongue(
        (
            "Wie viel ist {a} plus {b}?",
            "Ein Heft kostet {b} Euro. Wie viel kosten {a} Hefte? Antworte nur mit der Zahl.",
            (
                "Ein Zug fährt {b} Stunden lang mit {a} km/h und danach noch {c} Kilometer. Wie viele Kilometer sind"
                " das insgesamt?"
            ),
        ),
        _facts("""
1 | Wie heißt die Hauptstadt von Österreich? | Wien
2 | Wer schrieb den Faust? | Goethe
2 | Wie lautet der Plural von »das Haus«? | Häuser
3 | In welchem Jahr fiel die Berliner Mauer? | 1989
3 | Welches Gericht wacht in Deutschland über das Grundgesetz? | Bundesverfassungsgericht / Verfassungsgericht
"""),
    ),
    "pt": Tongue(
        (
            "Quanto é {a} mais {b}?",
            "Um caderno custa {b} reais. Quanto custam {a} cadernos? Responda só com o número.",
            "Um carro anda {b} horas a {a} km/h e depois mais {c} quilômetros. Quantos quilômetros percorreu no total?",
        ),
        _facts("""
1 | Qual é a capital do Brasil? | Brasília
2 | Quem escreveu Os Lusíadas? | Camões
2 | Qual é o plural de «pão»? | pães
3 | Em que ano o Brasil declarou a independência? | 1822
"""),
    ),
    "it": Tongue(
        (
            "Quanto fa {a} più {b}?",
            "Un quaderno costa {b} euro. Quanto costano {a} quaderni? Rispondi solo con il numero.",
            "Un treno viaggia per {b} ore a {a} km/h e poi per altri {c} chilometri. Quanti chilometri in tutto?",
        ),
        _facts("""
1 | Qual è la capitale della Francia? | Parigi
2 | Chi ha scritto la Divina Commedia? | Dante / Alighieri
3 | In che anno l'Italia è diventata una repubblica? | 1946
"""),
    ),
    "ja": Tongue(
        (
            "{a}足す{b}はいくつですか。",
            "1冊{b}円のノートを{a}冊買いました。全部でいくらですか。数字だけで答えてください。",
            "時速{a}キロで{b}時間走り、そのあとさらに{c}キロ走りました。全部で何キロ走りましたか。",
        ),
        _facts("""
1 | 日本の首都はどこですか。 | 東京
2 | 『源氏物語』の作者は誰ですか。 | 紫式部
2 | 「暑い」の反対の意味の言葉は何ですか。一語で答えてください。 | 寒い / さむい / 涼しい / 冷たい
3 | 江戸幕府を開いた人は誰ですか。 | 徳川家康 / 家康
3 | 水を電気分解すると、水素と何ができますか。 | 酸素
"""),
    ),
    "ru": Tongue(
        (
            "Сколько будет {a} плюс {b}?",
            "Тетрадь стоит {b} рублей. Сколько стоят {a} таких тетрадей? Ответь только числом.",
            (
                "Поезд шёл {b} часов со скоростью {a} км/ч, а потом проехал ещё {c} километров. Сколько всего"
                " километров он проехал?"
            ),
        ),
        _facts("""
1 | Какой город является столицей России? | Москва
2 | Кто написал роман «Война и мир»? | Толстой
3 | В каком году Юрий Гагарин полетел в космос? | 1961
"""),
    ),
    "ko": Tongue(
        (
            "{a} 더하기 {b}는 얼마입니까?",
            "공책 한 권은 {b}원입니다. {a}권은 모두 얼마입니까? 숫자로만 답하세요.",
            "기차가 시속 {a}km로 {b}시간 달린 뒤 {c}km를 더 갔습니다. 모두 몇 km를 갔습니까?",
        ),
        _facts("""
1 | 대한민국의 수도는 어디입니까? | 서울
2 | 한글을 만든 왕은 누구입니까? | 세종
3 | 광복절은 몇 월 며칠입니까? | 8월 15일 / 8월15일
"""),
    ),
}


# A section of their own, with which maps are fitted.
MORE_TONGUES: Mapping[str, Tongue] = {
    "ar": Tongue(
        (
            "كم يساوي {a} زائد {b}؟",
            "ثمن الدفتر {b} ريالات. كم ثمن {a} من هذه الدفاتر؟ أجب برقم فقط.",
            "سار قطار بسرعة {a} كم في الساعة لمدة {b} ساعات، ثم قطع {c} كيلومترًا أخرى. كم كيلومترًا قطع في المجموع؟",
        ),
        _facts("""
1 | ما هي عاصمة مصر؟ | القاهرة
2 | ما هو الغاز الذي تتنفسه الكائنات الحية لتعيش؟ أجب بكلمة واحدة. | الأكسجين / أكسجين / الاكسجين
2 | ما هو جمع كلمة «كتاب»؟ | كتب
3 | من هو مؤلف كتاب «المقدمة»؟ | خلدون
"""),
    ),
    "hi": Tongue(
        (
            "{a} और {b} का योग कितना है?",
            "एक कॉपी का दाम {b} रुपये है। ऐसी {a} कॉपियों का दाम कितना होगा? केवल संख्या लिखिए।",
            "एक रेलगाड़ी {b} घंटे तक {a} किमी प्रति घंटे की गति से चली, फिर {c} किलोमीटर और चली। कुल कितने किलोमीटर चली?",
        ),
        _facts("""
1 | भारत की राजधानी क्या है? | दिल्ली
2 | भारत का राष्ट्रगान किसने लिखा? | टैगोर / ठाकुर / टागोर
2 | "दिन" का विलोम शब्द क्या है? एक शब्द में उत्तर दीजिए। | रात / रात्रि
3 | भारत किस वर्ष स्वतंत्र हुआ? | 1947
"""),
    ),
    "tr": Tongue(
        (
            "{a} artı {b} kaç eder?",
            "Bir defter {b} lira. {a} defter kaç lira eder? Yalnızca sayıyla cevap ver.",
            "Bir tren saatte {a} km hızla {b} saat, sonra {c} kilometre daha gitti. Toplam kaç kilometre gitti?",
        ),
        _facts("""
1 | Türkiye'nin başkenti neresidir? | Ankara
2 | "Sıcak" kelimesinin zıt anlamlısı nedir? Tek kelimeyle cevap ver. | soğuk
3 | İstanbul hangi yılda fethedildi? | 1453
"""),
    ),
    "pl": Tongue(
        (
            "Ile to jest {a} plus {b}?",
            "Zeszyt kosztuje {b} złotych. Ile kosztuje {a} zeszytów? Odpowiedz samą liczbą.",
            "Pociąg jechał {b} godzin z prędkością {a} km/h, a potem jeszcze {c} km. Ile kilometrów przejechał?",
        ),
        _facts("""
1 | Jakie miasto jest stolicą Polski? | Warszawa
2 | Kto napisał „Pana Tadeusza”? | Mickiewicz
3 | W którym roku odbyła się bitwa pod Grunwaldem? | 1410
"""),
    ),
}


def _sum(rng: Random, tongue: Tongue, language: str, level: int) -> Draft:
    a, b, c = rng.randint(21, 97), rng.randint(3, 9), rng.randint(11, 98)
    second = c if level == 1 else b
    value = (a + second, a * b, a * b + c)[level - 1]
    text = tongue.sums[level - 1].format(a=a, b=second, c=c)
    return Draft(text, NumericGrader(value), f"{value}", level, LONG, language)


def _in(tongues: Mapping[str, Tongue]) -> Drafts:
    """Draw the languages in turn; within each, alternate sums and facts, as long as there are facts."""

    def drafts(rng: Random) -> Iterator[Draft]:
        left = {language: rng.sample(tongue.facts, len(tongue.facts)) for language, tongue in tongues.items()}
        levels = cycle(LEVELS)
        while True:
            level = next(levels)
            for language, tongue in tongues.items():
                yield _sum(rng, tongue, language, level)
                if left[language]:
                    fact = left[language].pop()
                    yield fact_draft(fact, language=language)

    return drafts


SECTIONS = (Section("other_languages", 36, _in(TONGUES)),)

MORE_SECTIONS = (Section("more_languages", 24, _in(MORE_TONGUES), family="other_languages"),)
