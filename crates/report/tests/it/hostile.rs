//! Text that wants to be more than text.

use crate::fake::{meta, record};
use report::{Check, Label, LayerScore, LayerScores, Meta, Report, Set, TradeOff};

const NASTY: [&str; 9] = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "x](javascript:alert(1))",
    "a | b \\| c",
    "line\nbreak\r\n\r\n# heading",
    "\u{202e}gpj.exe\u{2066}",
    "</title></style></svg><!-- ``` $x$ <b>",
    "\0\u{1b}[31m\u{200b}",
];

/// The text in every place that takes text.
fn everywhere(text: &str) -> Report {
    let all = |method: &str, set| {
        let mut r = record(1, text, method, Label::SafetyTask, 3, 40, 97);
        r.family = text.into();
        r.target.task = text.into();
        r.given = text.into();
        r.set = set;
        r.asr_precise = r.asr;
        r.kl_task = Some(0.01);
        r.coefficients = Some([(0, 1.0), (1, 0.0)].into());
        r.tradeoff = Some(vec![TradeOff { max_kl: 0.01, loss: 0.3, kl: 0.01 }]);
        r
    };
    let records = vec![all(text, Set::Known), all(text, Set::Shifted), all("gene", Set::Known)];
    let layers = vec![LayerScore { layer: 0, value: 1.0, selected: true }];
    let scores = LayerScores { family: text.into(), seed: 1, score: text.into(), layers };
    let t = || text.to_string();
    let meta = Meta {
        title: t(),
        version: t(),
        date: t(),
        command: t(),
        seconds: None,
        machine: vec![(t(), t())],
        settings: vec![(t(), t())],
        notes: vec![t()],
        checks: vec![Check { name: t(), text: t(), target: t(), value: t(), ok: None }],
    };
    Report::of(meta, records, vec![scores]).unwrap()
}

/// Control characters but for the page's own line breaks, and what turns the direction of writing.
fn bad(c: char) -> bool {
    (c.is_control() && c != '\n')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}')
}

#[test]
fn page_keeps_its_form_whatever_names_say() {
    let tags = |page: &str| -> Vec<String> {
        page.split('<').skip(1).map(|t| t.split(['>', ' ']).next().unwrap().to_string()).collect()
    };
    let plain = everywhere("plain").with_own_method("gene").html();
    // Where labels stand depends on how long they are: lines that lead to them come and go.
    let fixed = |page: &str| tags(page).into_iter().filter(|t| t != "path").collect::<Vec<_>>();
    for text in NASTY {
        let page = everywhere(text).html();
        assert_eq!(fixed(&page), fixed(&plain), "{text:?}");
        assert_eq!(page.matches("<script").count(), 1, "{text:?}");
        assert!(!page.contains("<img") && !page.contains("<b>") && !page.contains("<!--"), "{text:?}");
        assert!(!page.contains("' onmouseover='"), "{text:?}");
        assert_eq!(page.chars().find(|&c| bad(c)), None, "{text:?}");
    }
}

#[test]
fn markdown_keeps_its_form_whatever_names_say() {
    // Borders of cells: bars that no backslash stands before.
    let borders = |line: &str| {
        let (mut n, mut escaped) = (0, false);
        for c in line.chars() {
            n += usize::from(c == '|' && !escaped);
            escaped = c == '\\' && !escaped;
        }
        n
    };
    let form = |text: &str| text.lines().map(borders).collect::<Vec<_>>();
    let plain = form(&everywhere("plain").markdown());
    for text in NASTY {
        let got = everywhere(text).markdown();
        assert_eq!(form(&got), plain, "{text:?}");
        assert!(!got.contains("](") && !got.contains('<'), "{text:?}");
        assert!(!got.contains("\n# heading") && !got.contains("```"), "{text:?}");
        assert_eq!(got.chars().find(|&c| bad(c)), None, "{text:?}");
    }
}

#[test]
fn json_gives_back_what_it_was_given() {
    for text in NASTY {
        let json: serde_json::Value = serde_json::from_str(&everywhere(text).json().unwrap()).unwrap();
        assert_eq!(json["meta"]["title"], text);
        assert_eq!(json["tables"][0]["rows"][1]["method"], text);
    }
}

#[test]
fn name_of_a_megabyte_is_no_more_than_long() {
    let long = "x<".repeat(1 << 19);
    let report = Report::of(meta(), vec![record(1, &long, "gene", Label::Zero, 3, 0, 97)], vec![]).unwrap();
    assert!(report.html().len() < 8 * long.len());
}
