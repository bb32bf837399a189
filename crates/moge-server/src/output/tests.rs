use std::time::{Duration, Instant};

use moge_model::{Architecture, ToolFormat, thinking_delimiters};
use proptest::prelude::*;

use super::{Delta, OutputParser};

const ARCHITECTURES: [Architecture; 6] = Architecture::ALL;

/// The whole of an answer, its deltas put together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    reasoning: String,
    content: String,
    /// Name and arguments of each call.
    calls: Vec<(String, String)>,
}

impl Answer {
    fn add(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning += &text,
                Delta::Content(text) => self.content += &text,
                Delta::ToolCallStart { index, name } => {
                    assert_eq!(index, self.calls.len());
                    self.calls.push((name, String::new()));
                }
                Delta::ToolCallArguments { index, text } => {
                    assert_eq!(index + 1, self.calls.len(), "arguments belong to the last call");
                    self.calls[index].1 += &text;
                }
            }
        }
    }
}

fn parse_pieces<'a>(mut parser: OutputParser, pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let mut answer = Answer::default();
    for piece in pieces {
        answer.add(parser.push(piece));
    }
    answer.add(parser.finish());
    assert_eq!(parser.finish(), [], "finishing twice gives nothing twice");
    answer
}

fn parse(architecture: Architecture, text: &str) -> Answer {
    let whole = parse_pieces(OutputParser::new(architecture, false, true), [text]);
    let pieces = text.char_indices().map(|(start, c)| &text[start..start + c.len_utf8()]);
    assert_eq!(parse_pieces(OutputParser::new(architecture, false, true), pieces), whole, "one character at a time");
    whole
}

fn answer(reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Answer {
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect();
    Answer { reasoning: reasoning.to_owned(), content: content.to_owned(), calls }
}

#[test]
fn thinking_is_told_from_the_answer_without_markers_or_the_whitespace_around_it() {
    for (architecture, open, close) in
        [(Architecture::PanguProMoe, "[unused16]", "[unused17]"), (Architecture::Qwen3, "<think>", "</think>")]
    {
        let text = format!("\n{open}\nWhy? Because\n\nso.\n{close}\n\nYes.\n");
        assert_eq!(parse(architecture, &text), answer("Why? Because\n\nso.", "Yes.\n", &[]));
    }
    assert_eq!(parse(Architecture::Qwen3, "<think>\n\n</think>\n\nYes."), answer("", "Yes.", &[]));
}

#[test]
fn thinking_that_the_prompt_has_opened_needs_no_marker_and_may_have_one() {
    for text in ["So.</think>\nYes.", "<think>\nSo.\n</think>\n\nYes."] {
        let parser = OutputParser::new(Architecture::Qwen3, true, true);
        assert_eq!(parse_pieces(parser, [text]), answer("So.", "Yes.", &[]), "{text}");
    }
}

#[test]
fn thinking_that_is_not_closed_is_reasoning_to_its_end() {
    assert_eq!(parse(Architecture::Qwen3, "<think>a <tool_call> and </thin"), {
        answer("a <tool_call> and </thin", "", &[])
    });
    assert_eq!(parse_pieces(OutputParser::new(Architecture::PanguProMoe, true, false), ["Hm"]), answer("Hm", "", &[]));
}

#[test]
fn only_what_stands_at_the_beginning_is_thinking() {
    let late = "Yes. <think>Why?</think> So.";
    assert_eq!(parse(Architecture::Qwen3, late), answer("", late, &[]));
    let second = "<think>a</think>b<think>c</think>";
    assert_eq!(parse(Architecture::Qwen3, second), answer("a", "b<think>c</think>", &[]));
}

#[test]
fn whitespace_that_stands_before_ordinary_text_is_text() {
    assert_eq!(parse(Architecture::Qwen3, "  \n let"), answer("", "  \n let", &[]));
    assert_eq!(parse(Architecture::PanguProMoe, " \n"), answer("", " \n", &[]));
}

#[test]
fn the_line_break_before_a_turn_of_glm4_is_layout() {
    assert_eq!(parse(Architecture::Glm4, "\n  Yes.\n"), answer("", "  Yes.\n", &[]));
    assert_eq!(parse_pieces(OutputParser::new(Architecture::Glm4, false, false), ["\nYes"]), answer("", "Yes", &[]));
}

#[test]
fn the_markers_of_a_network_begin_with_a_character_that_stands_nowhere_else_in_them() {
    for architecture in ARCHITECTURES {
        let ((open, close), format) = (thinking_delimiters(architecture), architecture.tool_format());
        for marker in [Some(open), Some(close), Some(format.open()), format.close()].into_iter().flatten() {
            assert_eq!(marker.rfind(&open[..1]), Some(0), "{marker}");
        }
    }
}

#[test]
fn no_more_is_held_back_than_may_begin_a_marker() {
    let mut parser = OutputParser::new(Architecture::Qwen3, false, true);
    assert_eq!(parser.push("a<tool"), [Delta::Content("a".into())]);
    assert_eq!(parser.push("box"), [Delta::Content("<toolbox".into())]);
    assert_eq!(parser.push("<<"), [Delta::Content("<".into())]);
    assert_eq!(parser.push("think>"), [Delta::Content("<think>".into())], "thinking is over");
    assert_eq!(parser.finish(), []);
}

#[test]
fn a_call_streams_its_arguments_as_soon_as_they_begin() {
    let mut parser = OutputParser::new(Architecture::Qwen3, false, true);
    assert_eq!(parser.push("<tool_call>\n{\"name\": \"f\", \"arguments\": "), []);
    let start = Delta::ToolCallStart { index: 0, name: "f".into() };
    assert_eq!(parser.push("{"), [start, Delta::ToolCallArguments { index: 0, text: "{".into() }]);
    assert_eq!(parser.push("\"ä\": \""), [Delta::ToolCallArguments { index: 0, text: "\"ä\": \"".into() }]);
    assert_eq!(parser.push("\\\"}\"}"), [Delta::ToolCallArguments { index: 0, text: "\\\"}\"}".into() }]);
    assert_eq!(parser.push("}\n</tool_call>\n"), []);
    assert_eq!(parser.finish(), []);
}

#[test]
fn calls_of_every_network_come_with_their_arguments_as_written() {
    let (first, second) = (r#"{"city": "Paris \"}\" 城",  "days": [1, {"a": {}}]}"#, "{ }");
    let list = format!(
        r#"[unused11][{{"name": "get_weather", "arguments": {first}}}, {{"name": "now", "arguments": {second}}}][unused12]"#
    );
    let hermes = format!(
        "<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {first}}}\n</tool_call>\n\
         <tool_call>\n{{\"name\": \"now\", \"arguments\": {second}}}\n</tool_call>"
    );
    let glm = format!("get_weather\n{first}<|assistant|>now\n{second}\n");
    let expected = [("get_weather", first), ("now", second)];
    assert_eq!(parse(Architecture::PanguEmbedded, &list), answer("", "", &expected));
    assert_eq!(parse(Architecture::Qwen3, &hermes), answer("", "", &expected));
    assert_eq!(parse(Architecture::Glm4, &glm), answer("", "", &expected));
}

#[test]
fn a_call_may_follow_thinking_and_text() {
    let text =
        "<think>\nHm.\n</think>\n\nLet me see.\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\nDone.";
    assert_eq!(parse(Architecture::Qwen3, text), answer("Hm.", "Let me see.\n\nDone.", &[("f", "{}")]));
    let text = "<think>Hm.</think>\nf\n{}";
    assert_eq!(parse(Architecture::Glm4, text), answer("Hm.", "", &[("f", "{}")]));
    let text = "\nLet me see.<|assistant|>f \n{\"a\": 1}";
    assert_eq!(parse(Architecture::Glm4, text), answer("", "Let me see.", &[("f", "{\"a\": 1}")]));
}

#[test]
fn a_name_comes_first_though_the_model_writes_it_last() {
    let text = r#"<tool_call>{"id": [1, "]"], "n": -1.5e3, "arguments": {"a": "}"}, "ok": true, "name": "f\u002dg"}</tool_call>"#;
    assert_eq!(parse(Architecture::Qwen3, text), answer("", "", &[("f-g", r#"{"a": "}"}"#)]));
}

#[test]
fn what_is_no_call_is_content_unchanged() {
    let texts = [
        "<tool_call>",
        "<tool_call>\nnothing</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>{\"name\": \"f\"}</tool_call>",
        "<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"\\q\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {}, \"name\": \"\\q\"}</tool_call>",
        "<tool_call>{\"name\": 1, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"name\": \"g\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {]}, \"name\": \"f\"}</tool_call>",
        "<tool_call>{\"arguments\": {\"a\": 1",
        "<tool_call>{\"name\": \"f\", \"arguments\": ",
        " \n<tool_call> {,",
        "</tool_call>",
    ];
    for text in texts {
        assert_eq!(parse(Architecture::Qwen3, text), answer("", text, &[]), "{text}");
    }
    for text in ["[unused11][][unused12]", "[unused11]{\"name\": \"f\", \"arguments\": {}}[unused12]", "[unused11] x"] {
        assert_eq!(parse(Architecture::PanguProMoe, text), answer("", text, &[]), "{text}");
    }
    let long_line = format!("{}\n{{}}", "a".repeat(65));
    for text in ["Yes.", "two words\n{}", "Yes\nNo", "f", "f\n", "f \t", &long_line, "Yes.<|assistant|>\nNo", "f {}"] {
        assert_eq!(parse(Architecture::Glm4, text), answer("", text, &[]), "{text}");
    }
}

#[test]
fn a_failed_call_does_not_hide_the_next_one() {
    let call = "{\"name\": \"f\", \"arguments\": {}}";
    let text = format!("<tool_call><tool_call>{call}</tool_call>");
    assert_eq!(parse(Architecture::Qwen3, &text), answer("", "<tool_call>", &[("f", "{}")]));
    let text = format!("<tool_call>{call}<tool_call>{call}");
    assert_eq!(parse(Architecture::Qwen3, &text), answer("", "", &[("f", "{}"), ("f", "{}")]), "a close is missing");
}

#[test]
fn what_breaks_after_a_call_was_announced_is_content_from_there() {
    let text = "[unused11][{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": 2}][unused12]";
    let rest = ", {\"name\": 2}][unused12]";
    assert_eq!(parse(Architecture::PanguProMoe, text), answer("", rest, &[("f", "{\"a\": 1}")]));
    let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": ]}}</tool_call>";
    assert_eq!(parse(Architecture::Qwen3, text), answer("", "]}}</tool_call>", &[("f", "{\"a\": ")]));
    let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1";
    assert_eq!(parse(Architecture::Qwen3, text), answer("", "", &[("f", "{\"a\": [1")]), "cut off by its length");
    let text = "[unused11][{\"name\": \"f\", \"arguments\": {}} ";
    assert_eq!(parse(Architecture::PanguProMoe, text), answer("", "", &[("f", "{}")]));
}

#[test]
fn tool_markers_are_text_where_no_tools_are_allowed() {
    for architecture in ARCHITECTURES {
        let format = architecture.tool_format();
        let text = format!("f\n{{}}{}[{{\"name\": \"f\", \"arguments\": {{}}}}]", format.open());
        let parser = OutputParser::new(architecture, false, false);
        assert_eq!(parse_pieces(parser, [text.as_str()]), answer("", &text, &[]));
    }
}

#[test]
fn a_megabyte_takes_well_under_a_second_however_hostile() {
    let repeats = [
        "a",
        " ",
        "<",
        "<tool_cal",
        "<tool_call>",
        "<tool_call>{\"a\":{",
        "<tool_call>{\"arguments\":{\"",
        "[unused11][[unused11][",
        "[unused11][{\"name\":\"f\",\"arguments\":{",
        "<tool_call>{\"name\":\"f\",\"arguments\":{}}",
        "f\n{}",
        "f\n\n",
        "<|assistant|>",
    ];
    for repeated in repeats {
        let text = repeated.repeat((1 << 20) / repeated.len());
        for (architecture, starts_in_thinking) in [(Architecture::Qwen3, false), (Architecture::Glm4, true)] {
            let start = Instant::now();
            let parser = OutputParser::new(architecture, starts_in_thinking, true);
            // Four characters at a time, as tokens come.
            let pieces = text.as_bytes().chunks(4).map(|piece| std::str::from_utf8(piece).unwrap());
            parse_pieces(parser, pieces);
            assert!(start.elapsed() < Duration::from_secs(2), "{repeated}: {:?}", start.elapsed());
        }
    }
}

/// Pieces of markers, JSON and text that is neither.
fn fragment() -> impl Strategy<Value = String> {
    let words = [
        "[unused16]",
        "[unused17]",
        "[unused11]",
        "[unused12]",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|assistant|>",
        "[",
        "]",
        "{",
        "}",
        "<",
        ">",
        "\"",
        "\\",
        ":",
        ",",
        " ",
        "\n",
        "f",
        "get_weather\n",
        "ä",
        "城🙂",
        "\"name\"",
        "\"arguments\"",
        "\"name\": \"f\"",
        "\"arguments\": {",
        "[{\"name\": \"f\", \"arguments\": {}}]",
        "{\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}}",
        "{\"arguments\": {\"a\": {}}, \"name\": \"g\"}",
        "12",
        "true",
    ];
    (prop::sample::select(words.to_vec()), any::<prop::sample::Index>()).prop_flat_map(|(word, end)| {
        let ends: Vec<usize> = word.char_indices().map(|(start, c)| start + c.len_utf8()).collect();
        let prefix = word[..ends[end.index(ends.len())]].to_owned();
        prop_oneof![3 => Just(word.to_owned()), 1 => Just(prefix)]
    })
}

proptest! {
    #[test]
    fn however_a_text_is_cut_its_answer_is_the_same(
        architecture in prop::sample::select(ARCHITECTURES.to_vec()),
        starts_in_thinking: bool,
        tools_allowed: bool,
        fragments in prop::collection::vec(fragment(), 0..24),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let text = fragments.concat();
        let parser = || OutputParser::new(architecture, starts_in_thinking, tools_allowed);
        let whole = parse_pieces(parser(), [text.as_str()]);
        let borders: Vec<usize> = text.char_indices().map(|(start, _)| start).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| borders[cut.index(borders.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]);
        prop_assert_eq!(parse_pieces(parser(), pieces), whole);
    }

    #[test]
    fn text_without_a_call_is_lost_nowhere(
        architecture in prop::sample::select(ARCHITECTURES.to_vec()),
        fragments in prop::collection::vec(fragment(), 0..24),
    ) {
        // What comes after a letter and a full stop is neither thinking nor an unmarked call.
        let text = format!("A. {}", fragments.concat());
        let answer = parse_pieces(OutputParser::new(architecture, false, true), [text.as_str()]);
        prop_assert_eq!(answer.reasoning.as_str(), "");
        if answer.calls.is_empty() {
            prop_assert_eq!(answer.content, text);
        }
    }

    #[test]
    fn calls_that_are_written_are_read(
        architecture in prop::sample::select(ARCHITECTURES.to_vec()),
        calls in prop::collection::vec(("[a-zA-Z0-9_.-]{1,64}", prop::collection::btree_map(".*", ".*", 0..4)), 1..4),
    ) {
        let calls: Vec<(String, String)> =
            calls.into_iter().map(|(name, arguments)| (name, serde_json::to_string_pretty(&arguments).unwrap())).collect();
        let objects: Vec<String> =
            calls.iter().map(|(name, arguments)| format!("{{\"name\": \"{name}\", \"arguments\": {arguments}}}")).collect();
        let text = match architecture.tool_format() {
            ToolFormat::PanguList => format!("[unused11][{}][unused12]", objects.join(", ")),
            ToolFormat::Hermes => objects.iter().map(|call| format!("<tool_call>\n{call}\n</tool_call>\n")).collect(),
            ToolFormat::Glm4 => {
                let turns: Vec<String> = calls.iter().map(|(name, arguments)| format!("{name}\n{arguments}")).collect();
                turns.join("<|assistant|>")
            }
        };
        let expected = Answer { calls, ..Answer::default() };
        prop_assert_eq!(parse_pieces(OutputParser::new(architecture, false, true), [text.as_str()]), expected);
    }
}
