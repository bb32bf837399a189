//! `strftime` for chat templates that state the date. Times are UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const SECONDS_PER_DAY: u64 = 86_400;

/// `strftime_now(format)`: the time of the call.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    // A clock before 1970 is wrong; take the epoch.
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(format, seconds)
}

/// Format a time in seconds since 1970.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second_of_day) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
    let date = Date::from_days(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let weekday = WEEKDAYS[(days as usize + 4) % 7]; // 1970-01-01 was a Thursday.
    let month_name = MONTHS[date.month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let text = match chars.next() {
            Some('Y') => date.year.to_string(),
            Some('y') => format!("{:02}", date.year % 100),
            Some('m') => format!("{:02}", date.month),
            Some('d') => format!("{:02}", date.day),
            Some('e') => format!("{:2}", date.day),
            Some('j') => format!("{:03}", date.day_of_year),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{hour12:02}"),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let found = other.map_or(String::from("%"), |c| format!("%{c}"));
                let problem = format!("strftime_now: {found:?} is not supported; allowed: %YymdejBbAaHIMSpFT%");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

struct Date {
    year: u64,
    /// From 1.
    month: u64,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
}

impl Date {
    /// The date `days` after 1970-01-01.
    fn from_days(days: u64) -> Self {
        // The calendar repeats every 400 years; the rest is counted year by year and month by month.
        const DAYS_PER_400_YEARS: u64 = 146_097;
        let mut year = 1970 + days / DAYS_PER_400_YEARS * 400;
        let mut left = days % DAYS_PER_400_YEARS;
        while left >= days_in_year(year) {
            left -= days_in_year(year);
            year += 1;
        }
        let day_of_year = left + 1;
        let mut month = 1;
        while left >= days_in_month(year, month) {
            left -= days_in_month(year, month);
            month += 1;
        }
        Self { year, month, day: left + 1, day_of_year }
    }
}

fn is_leap_year(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    365 + u64::from(is_leap_year(year))
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap_year(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_format_says() {
        // Expected values from Python's datetime.
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 Thu 12 AM 001"),
            (951_782_399, "2000-02-28 23:59:59 Mon 11 PM 059"),
            (951_782_400, "2000-02-29 00:00:00 Tue 12 AM 060"),
            (1_735_649_999, "2024-12-31 12:59:59 Tue 12 PM 366"),
            (4_107_542_400, "2100-03-01 00:00:00 Mon 12 AM 060"),
        ] {
            assert_eq!(strftime("%F %T %a %I %p %j", seconds).unwrap(), expected);
        }
        let long = strftime("%d %b %Y, %A %e %B %y %m %H:%M:%S %%", 1_749_945_600).unwrap();
        assert_eq!(long, "15 Jun 2025, Sunday 15 June 25 06 00:00:00 %");
    }

    #[test]
    fn unknown_directives_are_refused() {
        assert!(strftime("%Q", 1).unwrap_err().to_string().contains("\"%Q\" is not supported"));
        assert!(strftime("100%", 1).is_err());
    }
}
