//! Looks up users in the guest's /etc/passwd.

/// The home directory of a user, as in runc: `/` if there is no entry (passwd(5)).
pub fn home(uid: u32, passwd: &str) -> &str {
    let home = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [_, _, id, _, _, home, ..] = fields[..] else {
            return None;
        };
        (id.parse() == Ok(uid)).then_some(home)
    });
    home.filter(|home| !home.is_empty()).unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_that_of_the_first_entry_with_the_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken:0\napp:x:1000:1001::/home/app:/bin/sh\n\
                      1001:x:5:5::/wrong:\nagain:x:1000:1::/other:\nnone:x:7:7:::\n";
        assert_eq!(home(0, passwd), "/root");
        assert_eq!(home(1000, passwd), "/home/app");
        assert_eq!(home(1001, passwd), "/");
        assert_eq!(home(7, passwd), "/");
    }
}
