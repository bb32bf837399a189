use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method, Request, header};
use moge_engine::{AdmitError, FinishReason};
use serde::de::value::Error as DeError;
use serde::de::{DeserializeOwned, Deserializer, Error, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};
use tower::ServiceExt;

use super::super::chat::ChatFields;
use super::super::completions::CompletionFields;
use super::super::misc::{DetokenizeFields, TokenizeFields};
use super::super::responses::{ReasoningFields, ResponsesFields, TextFields};
use super::super::{router, routes};
use super::OPENAPI;
use crate::app::{App, ServerConfig};
use crate::error::ApiError;
use crate::metrics::{Metrics, RequestTimes};
use crate::params::{FormatFields, SamplingFields, StreamOptions};

const HTTP_API: &str = include_str!("../../../../../docs/http-api.md");

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

fn schema<'a>(document: &'a Value, name: &str) -> &'a Value {
    let schema = &document["components"]["schemas"][name];
    assert!(schema.is_object(), "openapi.json: no schema {name}");
    schema
}

/// A deserializer that notes which fields a struct asks for, and gives none.
struct FieldNames<'a>(&'a mut BTreeSet<&'static str>);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, DeError> {
        Err(DeError::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, DeError> {
        self.0.extend(fields);
        Err(DeError::custom("the names are all we want"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// Assert that the schema `name` has the fields of `T`, no more and no fewer, of types that `T` takes.
fn assert_describes<T: DeserializeOwned>(document: &Value, name: &str) {
    let schema = schema(document, name);
    let properties = schema["properties"].as_object().unwrap();
    let described: BTreeSet<&str> = properties.keys().map(String::as_str).collect();
    let mut taken = BTreeSet::new();
    let _ = T::deserialize(FieldNames(&mut taken));
    assert_eq!(described, taken, "openapi.json: {name}");
    let full: Map<String, Value> =
        properties.iter().map(|(field, schema)| (field.clone(), sample(document, schema))).collect();
    if let Err(error) = serde_json::from_value::<T>(full.clone().into()) {
        panic!("openapi.json: {name} has another type than the code: {error} in {}", Value::Object(full));
    }
    let is_required = |field: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == field));
    for field in taken {
        let mut rest = full.clone();
        rest.shift_remove(field);
        let is_needed = serde_json::from_value::<T>(rest.into()).is_err();
        assert_eq!(is_needed, is_required(field), "openapi.json: {name}: is {field} required?");
    }
}

/// A value that `schema` allows.
fn sample(document: &Value, schema: &Value) -> Value {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/components/schemas/")) {
        return sample(document, self::schema(document, name));
    }
    if let Some(first) = schema["oneOf"].get(0) {
        return sample(document, first);
    }
    let kind = schema["type"].get(0).unwrap_or(&schema["type"]);
    match kind.as_str() {
        Some("boolean") => true.into(),
        Some("integer") => 1.into(),
        Some("number") => 0.5.into(),
        Some("string") => "text".into(),
        Some("array") => vec![sample(document, &schema["items"])].into(),
        Some("object") => Map::new().into(),
        _ => schema["const"].clone(),
    }
}

#[test]
fn every_field_of_a_request_is_described_and_every_described_field_is_taken() {
    let document = document();
    assert_describes::<ChatFields>(&document, "ChatFields");
    assert_describes::<CompletionFields>(&document, "CompletionFields");
    assert_describes::<ResponsesFields>(&document, "ResponsesFields");
    assert_describes::<TextFields>(&document, "TextFields");
    assert_describes::<ReasoningFields>(&document, "ReasoningFields");
    assert_describes::<SamplingFields>(&document, "SamplingFields");
    assert_describes::<FormatFields>(&document, "FormatFields");
    assert_describes::<StreamOptions>(&document, "StreamOptions");
    assert_describes::<TokenizeFields>(&document, "TokenizeFields");
    assert_describes::<DetokenizeFields>(&document, "DetokenizeFields");
}

#[tokio::test]
async fn every_path_is_described_with_its_methods() {
    let document = document();
    let described = document["paths"].as_object().unwrap();
    let served: BTreeSet<String> = routes().iter().map(|(path, _)| path.replace("{*", "{")).collect();
    assert_eq!(described.keys().cloned().collect::<BTreeSet<_>>(), served);
    let router = router(Arc::new(App::new(config())));
    for (path, operations) in described {
        // No path takes this method, and the refusal lists those that it takes.
        let request = Request::builder().method(Method::TRACE).uri(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let allowed = response.headers()[header::ALLOW].to_str().unwrap();
        let methods = operations.as_object().unwrap().keys().map(|method| method.to_uppercase());
        let methods: Vec<String> = methods.map(|m| if m == "GET" { "GET,HEAD".to_owned() } else { m }).collect();
        assert_eq!(methods.join(","), allowed, "openapi.json: {path}");
    }
}

#[test]
fn what_it_refers_to_is_there_and_all_that_is_there_is_referred_to() {
    let document = document();
    let mut referred = BTreeSet::from(["#/components/securitySchemes/key".to_owned()]);
    collect_references(&document, &mut referred);
    let mut there = BTreeSet::new();
    for (section, entries) in document["components"].as_object().unwrap() {
        there.extend(entries.as_object().unwrap().keys().map(|name| format!("#/components/{section}/{name}")));
    }
    assert_eq!(referred, there);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

fn collect_references(value: &Value, references: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            references.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| collect_references(value, references));
        }
        Value::Array(values) => values.iter().for_each(|value| collect_references(value, references)),
        _ => {}
    }
}

/// One error of each kind.
fn errors() -> Vec<ApiError> {
    let full = AdmitError::QueueFull { max_waiting: 3 };
    let errors = vec![
        ApiError::invalid("n", "is not allowed"),
        ApiError::NotJson(serde_json::from_str::<Value>("{").unwrap_err()),
        ApiError::WrongShape { param: "n".to_owned(), message: "is no number".to_owned() },
        ApiError::PromptTooLong { param: "prompt", num_tokens: 7, max_model_len: 5 },
        ApiError::Unauthorized,
        ApiError::UnknownModel("other".to_owned()),
        ApiError::NotFound("/nowhere".to_owned()),
        ApiError::MethodNotAllowed("TRACE".to_owned()),
        ApiError::DeadEnd,
        ApiError::BodyTooSlow(Duration::from_secs(30)),
        ApiError::BodyTooLarge(11),
        ApiError::NotDeclaredJson,
        ApiError::from(full),
        ApiError::Deadline(Duration::from_secs(13)),
        ApiError::Unavailable("the model is being loaded"),
        ApiError::Internal("a defect".to_owned()),
    ];
    for error in &errors {
        // A kind that is missing here does not compile: add it above too.
        match error {
            ApiError::Invalid { .. }
            | ApiError::NotJson(_)
            | ApiError::WrongShape { .. }
            | ApiError::PromptTooLong { .. }
            | ApiError::Unauthorized
            | ApiError::UnknownModel(_)
            | ApiError::NotFound(_)
            | ApiError::MethodNotAllowed(_)
            | ApiError::DeadEnd
            | ApiError::BodyTooSlow(_)
            | ApiError::BodyTooLarge(_)
            | ApiError::NotDeclaredJson
            | ApiError::Busy(_)
            | ApiError::Deadline(_)
            | ApiError::Unavailable(_)
            | ApiError::Internal(_) => {}
        }
    }
    errors
}

#[test]
fn every_error_is_described_with_its_status_type_and_code() {
    let document = document();
    let mut statuses = BTreeSet::new();
    for path in document["paths"].as_object().unwrap().values() {
        for operation in path.as_object().unwrap().values() {
            statuses.extend(operation["responses"].as_object().unwrap().keys().filter(|status| *status != "200"));
        }
    }
    let errors = errors();
    let answered: BTreeSet<String> = errors.iter().map(|error| error.status().as_u16().to_string()).collect();
    assert_eq!(statuses, answered.iter().collect());
    let described = &schema(&document, "Error")["properties"]["error"]["properties"];
    for field in ["type", "code"] {
        let mut answered: Vec<Value> = errors.iter().map(|error| error.body()["error"][field].clone()).collect();
        let mut described = described[field]["enum"].as_array().unwrap().clone();
        answered.sort_by_key(Value::to_string);
        answered.dedup();
        described.sort_by_key(Value::to_string);
        assert_eq!(described, answered, "openapi.json: Error: {field}");
    }
    for error in errors {
        let (status, body) = (error.status().as_u16(), error.body());
        let code = body["error"]["code"].as_str().map_or("null".to_owned(), |code| format!("`{code}`"));
        let row = format!("| {status} | `{}` | {code} |", body["error"]["type"].as_str().unwrap());
        assert!(HTTP_API.contains(&row), "docs/http-api.md: the table of errors has no {row}");
    }
}

#[test]
fn every_field_and_path_is_on_the_page_for_people() {
    let document = document();
    let mut missing = Vec::new();
    let schemas =
        ["ChatFields", "CompletionFields", "ResponsesFields", "SamplingFields", "FormatFields", "TokenizeFields"];
    let fields = schemas.iter().flat_map(|name| schema(&document, name)["properties"].as_object().unwrap().keys());
    for name in fields.chain(document["paths"].as_object().unwrap().keys()) {
        if !HTTP_API.contains(&format!("`{name}`")) {
            missing.push(name);
        }
    }
    assert!(missing.is_empty(), "docs/http-api.md: does not mention {missing:?}");
}

#[test]
fn every_series_is_on_the_page_for_people() {
    let metrics = Metrics::new("a-model");
    metrics.answered("/v1/models", 200, Duration::from_millis(7));
    metrics.finished(&RequestTimes::new(Instant::now(), 5), FinishReason::Stop);
    let text = metrics.render();
    let series = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let missing: Vec<&str> = series.filter(|name| !HTTP_API.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/http-api.md: does not mention {missing:?}");
    assert!(text.contains("# HELP http_requests_total"), "{text}");
}

fn config() -> ServerConfig {
    ServerConfig {
        address: ([127, 0, 0, 1], 0).into(),
        api_keys: Vec::new(),
        cors_origins: Vec::new(),
        max_body_bytes: 1 << 20,
        max_connections: 17,
        max_answers: 5,
        max_request_time: Duration::from_secs(19),
        drain_time: Duration::from_secs(3),
    }
}
